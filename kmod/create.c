// SPDX-License-Identifier: GPL-2.0-only
/*
 * Enters a socket that the current process has just made. The result is that of
 * sniffer_owner_gain(), without the searches that cannot find anything yet.
 */
#include <linux/cred.h>
#include <linux/fdtable.h>
#include <linux/sched/signal.h>
#include <net/inet_sock.h>

#include "create.h"
#include "owner.h"
#include "process.h"
#include "table.h"

/* State HELD, before anybody can find the entry: no lock. Takes the reference of @proc over. */
static void create_fill(struct sniffer_owner *owner, const struct sock *sk, struct socket *sock,
			struct sniffer_proc *proc)
{
	RCU_INIT_POINTER(owner->user, proc);
	owner->since = sniffer_owner_clock();
	owner->tid = current->pid;
	owner->port = inet_sk(sk)->inet_num;	/* a raw socket's is its protocol */
	owner->held = true;
	owner->creator = proc->tgid;
	owner->creator_start = proc->start_ns;
	owner->seen = jiffies;
	if (sniffer_probes_tell_release())
		owner->sock = sock;
	/* another process with the same table (clone() with CLONE_FILES) has it at once */
	if (current->files && atomic_read(&current->files->count) > get_nr_threads(current)) {
		owner->many = true;
		sniffer_owner_tick();
	}
}

/**
 * sniffer_create - the current process made a socket
 * @sk: full socket that the table is about; it has no descriptor yet
 * @sock: its socket
 *
 * A socket that has no cookie is in nobody's table: there is no entry of it, and
 * nobody else makes one. No other entry changes, so the stripe's version stays.
 *
 * Return: false when this is for sniffer_owner_gain().
 */
bool sniffer_create(struct sock *sk, struct socket *sock)
{
	struct sniffer_owner *owner;
	struct sniffer_proc *proc;
	raw_spinlock_t *lock;
	unsigned long flags;
	u64 cookie;

	if (atomic64_read(&sk->sk_cookie))
		return false;
	rcu_read_lock();
	proc = sniffer_process_find(current);
	if (proc && !refcount_inc_not_zero(&proc->refs))
		proc = NULL;
	rcu_read_unlock();
	if (!proc)
		return false;
	sniffer_process_refresh(proc);
	cookie = sniffer_owner_new_cookie(sk);
	owner = sniffer_owner_alloc(sk, cookie);
	if (!owner) {
		sniffer_process_put(proc);
		return true;
	}
	create_fill(owner, sk, sock, proc);
	/* the lock of its bucket, for that alone; the process's within, as everywhere */
	lock = sniffer_owner_lock(cookie);
	raw_spin_lock_irqsave(lock, flags);
	raw_spin_lock(&proc->lock);
	list_add_tail(&owner->by_user, &proc->uses);
	proc->nuses++;
	raw_spin_unlock(&proc->lock);
	sniffer_owner_insert(owner);
	sniffer_owner_index_inode(owner, SOCK_INODE(sock)->i_ino);
	raw_spin_unlock_irqrestore(lock, flags);
	return true;
}

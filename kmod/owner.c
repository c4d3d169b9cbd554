// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which process owns a socket, and so its packets.
 *
 * | state    | fields            | who is named                | left when                        |
 * |----------|-------------------|-----------------------------|----------------------------------|
 * | (none)   | no entry          | nobody, with a reason       | created, used, found at load; a  |
 * |          |                   |                             | handshake ends: VIA; the kernel  |
 * |          |                   |                             | accepts or closes it: SERVER     |
 * | VIA      | via               | the listener's user, or the | accepted: HELD; 130 s            |
 * |          |                   | MPTCP parent's              |                                  |
 * | SERVER   | server            | nobody: it is the kernel's  | a process uses it: HELD; freed   |
 * | HELD     | user, held        | user                        | another one who has it uses or   |
 * |          |                   |                             | receives it: HELD, the old user  |
 * |          |                   |                             | joins the past; user closes it:  |
 * |          |                   |                             | settle                           |
 * | (settle) | user, held, file, | user, DEAD if it exited     | at once, by the task that closed |
 * |          | exit              |                             | it: HELD by an heir; UNHELD      |
 * | UNHELD   | user, not held    | user, flagged DEAD          | somebody uses or receives it:    |
 * |          |                   |                             | HELD; the kernel uses it, and    |
 * |          |                   |                             | user has exited: SERVER; its     |
 * |          |                   |                             | file goes: RELEASED              |
 * | RELEASED | released          | user, flagged DEAD          | freed                            |
 * | dead     | dead              | user, flagged DEAD          | 2 s, or 130 s after a state that |
 * |          |                   |                             | leaves a TIME_WAIT               |
 *
 * Rules, each checked on real traffic:
 * - the last process that used a socket and still has it owns its packets;
 * - a process that does not have a socket does not use it, whatever runs in its context;
 * - of several who have a socket, whose receive call waits longest gets the next datagram;
 * - receiving a descriptor (SCM_RIGHTS, pidfd_getfd) is a use;
 * - the table has no list of holders. When the user closes the socket, holders.c searches
 *   descriptor tables. The heir is the latest earlier user that still has it. Without one it is
 *   another holder: a guess, flagged AMBIGUOUS while there are several;
 * - a process without a descriptor of its socket keeps it while its io_uring may refer to it:
 *   the file has references that no descriptor explains;
 * - an entry outlives its socket: TIME_WAIT and orphans still send.
 *
 * So fork, exec and exit do no work for each socket. Memory is bounded by max_sockets and
 * max_processes alone.
 */
#include <linux/tcp.h>
#include <net/inet_sock.h>
#include <net/tcp.h>

#include "alive.h"
#include "owner.h"
#include "process.h"

static atomic64_t owner_clock;	/* counts forks of processes that have sockets */

static void owner_note_address(struct sniffer_owner *owner, const struct sock *sk)
{
	owner->port = inet_sk(sk)->inet_num;
	owner->listens = sk->sk_state == TCP_LISTEN;
	if (sk->sk_family == AF_INET)
		memcpy(owner->addr, &inet_sk(sk)->inet_rcv_saddr, 4);
#if IS_ENABLED(CONFIG_IPV6)
	else
		memcpy(owner->addr, &sk->sk_v6_rcv_saddr, 16);
#endif
}

/* Under the cookie's lock. As far as is known, its user no longer has it. */
static void owner_let_go(struct sniffer_owner *owner)
{
	struct sniffer_proc *user = rcu_dereference_protected(owner->user, true);

	WRITE_ONCE(owner->held, false);
	owner->ring = false;
	owner->seen = jiffies;
	if (list_empty(&owner->by_user))
		return;
	raw_spin_lock(&user->lock);
	list_del_init(&owner->by_user);
	user->nuses--;
	raw_spin_unlock(&user->lock);
}

/* Under the cookie's lock. Removes @proc from the earlier users. */
static void owner_forget(struct sniffer_owner *owner, const struct sniffer_proc *proc)
{
	unsigned int i = 0;

	while (i < SNIFFER_OWNER_PAST - 1 && owner->past[i] != proc)
		i++;
	if (owner->past[i] != proc)
		return;
	sniffer_process_put(owner->past[i]);
	for (; i < SNIFFER_OWNER_PAST - 1; i++)
		owner->past[i] = owner->past[i + 1];
	owner->past[i] = NULL;
}

static void owner_forget_all(struct sniffer_owner *owner)
{
	while (owner->past[0])
		owner_forget(owner, owner->past[0]);
}

/*
 * Under the cookie's lock. Makes @proc the user; takes its own reference. If @kept, the
 * user before may still have the socket and becomes an earlier one.
 */
static void owner_set_user(struct sniffer_owner *owner, struct sniffer_proc *proc, bool kept)
{
	struct sniffer_proc *old = rcu_dereference_protected(owner->user, true);
	unsigned int i;

	if (old != proc) {
		refcount_inc(&proc->refs);
		owner_let_go(owner);
		owner_forget(owner, proc);
		rcu_assign_pointer(owner->user, proc);
		if (old && kept && !owner->guess && !READ_ONCE(old->exit_jiffies)) {
			sniffer_process_put(owner->past[SNIFFER_OWNER_PAST - 1]);
			for (i = SNIFFER_OWNER_PAST - 1; i > 0; i--)
				owner->past[i] = owner->past[i - 1];
			owner->past[0] = old;
		} else {
			sniffer_process_put(old);
		}
	}
	owner->seen = jiffies;
	WRITE_ONCE(owner->held, true);
	if (!list_empty(&owner->by_user))
		return;
	raw_spin_lock(&proc->lock);
	list_add_tail(&owner->by_user, &proc->uses);
	proc->nuses++;
	raw_spin_unlock(&proc->lock);
}

/*
 * Has the last reference to its file gone? Then its release was seen, or will be. Under
 * the entry's lock: a release that is seen later finds the entry.
 */
static bool owner_is_closing(const struct socket *sock)
{
	struct file *file = READ_ONCE(sock->file);

	return file && !file_count(file);
}

/**
 * sniffer_owner_gain - a process uses or has received a socket
 * @sk: full socket
 * @gain: which process, and how
 *
 * If the socket is new, or was not accepted so far, the process becomes its creator.
 * Several processes may have had the socket at load. If none was seen to use it, the
 * last one entered is named.
 */
void sniffer_owner_gain(struct sock *sk, const struct sniffer_gain *gain)
{
	bool unknown = !atomic64_read(&sk->sk_cookie);
	u64 cookie = sniffer_owner_cookie(sk);
	raw_spinlock_t *lock = sniffer_owner_lock(cookie);
	struct sniffer_owner *owner, *fresh = NULL;
	bool seeded = gain->flags & SNIFFER_F_SEEDED;
	struct sniffer_proc *user;
	unsigned long flags;
	bool known;

	rcu_read_lock();
	if (unknown || !sniffer_owner_find(cookie))
		fresh = sniffer_owner_alloc(sk, cookie);
	raw_spin_lock_irqsave(lock, flags);
	sniffer_owner_change(lock);
	owner = sniffer_owner_find(cookie);
	known = owner;
	if (!known)
		owner = fresh;
	if (!owner)
		goto out;
	user = rcu_dereference_protected(owner->user, true);
	if (owner->via || (!known && !(gain->flags & (SNIFFER_F_SEEDED | SNIFFER_F_INHERITED)))) {
		owner->creator = gain->proc->tgid;
		owner->creator_start = gain->proc->start_ns;
	}
	owner_note_address(owner, sk);
	if (!user)
		owner->since = sniffer_owner_clock();
	if (!owner->many &&
	    (gain->many || (user && user != gain->proc) || gain->flags & SNIFFER_F_INHERITED)) {
		WRITE_ONCE(owner->many, true);
		sniffer_owner_tick();
	}
	/* after its release was seen, nothing would clear it */
	if (gain->sock && owner_is_closing(gain->sock))
		owner->released = true;
	else if (gain->sock && !owner->released)
		WRITE_ONCE(owner->sock, gain->sock);
	if (!user || !seeded || owner->guess) {
		if (gain->flags)
			WRITE_ONCE(owner->flags, (owner->flags & ~SNIFFER_F_INHERITED) |
				   gain->flags);
		owner_set_user(owner, gain->proc, true);
		WRITE_ONCE(owner->tid, gain->tid);
		WRITE_ONCE(owner->guess, seeded || gain->guess);
		owner->ring = gain->ring;
		if (gain->fd >= 0)
			owner->fd = gain->fd;
	}
	/*
	 * The hooks read without the lock. Only now, with a user in place, may they
	 * find the entry, or stop asking the listener.
	 */
	if (owner->via) {
		WRITE_ONCE(owner->dead, 0);
		smp_store_release(&owner->via, 0);	/* pairs with name.c */
	}
	if (!known) {
		sniffer_owner_insert(owner);
		fresh = NULL;
	}
	sniffer_owner_index_inode(owner, gain->inode);
out:
	sniffer_owner_changed(lock);
	raw_spin_unlock_irqrestore(lock, flags);
	rcu_read_unlock();
	sniffer_owner_drop(fresh);
}

/**
 * sniffer_owner_serve - a server in the kernel has accepted a socket, or the kernel closes its own
 * @sk: full socket
 * @sock: its socket; NULL: closed
 *
 * So it stays known as the kernel's after server and listener have gone, and in a TIME_WAIT.
 */
void sniffer_owner_serve(struct sock *sk, struct socket *sock)
{
	u64 cookie = sniffer_owner_cookie(sk);
	raw_spinlock_t *lock = sniffer_owner_lock(cookie);
	struct sniffer_owner *owner, *fresh = NULL;
	unsigned long flags;

	rcu_read_lock();
	if (!sniffer_owner_find(cookie))
		fresh = sniffer_owner_alloc(sk, cookie);
	raw_spin_lock_irqsave(lock, flags);
	sniffer_owner_change(lock);
	owner = sniffer_owner_find(cookie);
	if (!owner && fresh) {
		owner = fresh;
		fresh = NULL;
		owner_note_address(owner, sk);
		sniffer_owner_insert(owner);
	}
	if (owner && !rcu_access_pointer(owner->user)) {
		WRITE_ONCE(owner->sock, sniffer_probes_tell_release() ? sock : NULL);
		owner->seen = jiffies;
		WRITE_ONCE(owner->dead, 0);
		WRITE_ONCE(owner->server, true);
		smp_store_release(&owner->via, 0);	/* pairs with name.c */
		owner->waits = !sock;
		if (!sock)
			sniffer_owner_dies(owner);
	}
	sniffer_owner_changed(lock);
	raw_spin_unlock_irqrestore(lock, flags);
	rcu_read_unlock();
	sniffer_owner_drop(fresh);
}

/**
 * sniffer_owner_take - current, a kernel thread, sends or receives on a socket
 * @owner: the entry, under RCU
 *
 * Who gave the socket to the kernel (for a file system, a disk) is its user until
 * it exits. Before Linux 5.12 the workers of an io_uring are kernel threads too.
 */
void sniffer_owner_take(struct sniffer_owner *owner)
{
	raw_spinlock_t *lock = sniffer_owner_lock(owner->cookie);
	const struct sniffer_proc *user;
	unsigned long flags;

	if (READ_ONCE(owner->held) || READ_ONCE(owner->server) || current->flags & PF_IO_WORKER)
		return;
	raw_spin_lock_irqsave(lock, flags);
	sniffer_owner_change(lock);
	user = rcu_dereference_protected(owner->user, true);
	if (user && READ_ONCE(user->exit_jiffies) && !owner->held && !owner->released)
		WRITE_ONCE(owner->server, true);
	sniffer_owner_changed(lock);
	raw_spin_unlock_irqrestore(lock, flags);
}

/**
 * sniffer_owner_inherit - the user of a socket has closed it
 * @cookie: the socket's
 * @from: its user so far
 * @file: its file when the heir was searched
 * @heir: the new user; NULL: nobody has the socket
 * @fd: @heir's descriptor of it
 * @past: @heir is an earlier user, not a guess
 *
 * Return: false if the socket has changed since the search.
 */
bool sniffer_owner_inherit(u64 cookie, const struct sniffer_proc *from, const struct file *file,
			   struct sniffer_proc *heir, int fd, bool past)
{
	raw_spinlock_t *lock = sniffer_owner_lock(cookie);
	struct sniffer_owner *owner;
	unsigned long flags;
	bool valid;

	raw_spin_lock_irqsave(lock, flags);
	sniffer_owner_change(lock);
	owner = sniffer_owner_find(cookie);
	valid = owner && rcu_access_pointer(owner->user) == from && owner->held &&
		sniffer_owner_file(owner) == file;
	if (valid && heir) {
		owner_set_user(owner, heir, false);
		WRITE_ONCE(owner->tid, 0);
		WRITE_ONCE(owner->guess, !past);
		WRITE_ONCE(owner->many, true);
		WRITE_ONCE(owner->flags, owner->flags | SNIFFER_F_INHERITED);
		owner->ring = false;
		owner->fd = fd;
	} else if (valid) {
		owner_let_go(owner);
	}
	sniffer_owner_changed(lock);
	raw_spin_unlock_irqrestore(lock, flags);
	return valid;
}

/**
 * sniffer_owner_tick - advance the clock, which counts forks of processes with sockets
 */
u64 sniffer_owner_tick(void)
{
	return atomic64_inc_return(&owner_clock);
}

/**
 * sniffer_owner_clock - changes whenever a socket may have become shared
 */
u64 sniffer_owner_clock(void)
{
	return atomic64_read(&owner_clock);
}

/**
 * sniffer_owner_refer - let another socket's owner own a socket's packets
 * @sk: request socket whose handshake this packet completes, or MPTCP subflow
 * @via: cookie of the listener or of the MPTCP parent, which is in the table
 * @how: SNIFFER_HOW_LISTENER or SNIFFER_HOW_INODE
 *
 * The child of a request inherits its cookie, and with it this entry. A SYN alone makes
 * no entry, so that a flood cannot fill the table.
 */
void sniffer_owner_refer(struct sock *sk, u64 via, u8 how)
{
	u64 cookie = sniffer_owner_cookie(sk);
	struct sniffer_owner *owner, *fresh = NULL;
	raw_spinlock_t *lock = sniffer_owner_lock(cookie);
	unsigned long flags;

	owner = sniffer_owner_find(cookie);
	if (owner && (!READ_ONCE(owner->via) || READ_ONCE(owner->via_how) == how))
		return;
	if (!owner)
		fresh = sniffer_owner_alloc(sk, cookie);
	raw_spin_lock_irqsave(lock, flags);
	sniffer_owner_change(lock);
	owner = sniffer_owner_find(cookie);
	if (!owner && fresh) {
		owner = fresh;
		fresh = NULL;
		owner->via = via;
		owner->via_how = how;
		sniffer_owner_insert(owner);
		/* the end of such a socket is not seen: forget it in time, unless it is accepted */
		sniffer_owner_dies(owner);
	} else if (owner && owner->via) {
		WRITE_ONCE(owner->via, via);
		WRITE_ONCE(owner->via_how, how);
		sniffer_owner_dies(owner);
	}
	sniffer_owner_changed(lock);
	raw_spin_unlock_irqrestore(lock, flags);
	sniffer_owner_drop(fresh);
}

/**
 * sniffer_owner_remove - forget a socket
 * @owner: under the cookie's lock, or when nobody else is left
 */
void sniffer_owner_remove(struct sniffer_owner *owner)
{
	owner_let_go(owner);
	owner_forget_all(owner);
	sniffer_owner_unlink(owner);
}

/* Calls @change, which is inlined, under the lock of @sk's entry, if there is one. */
static __always_inline void owner_change(const struct sock *sk,
					 void (*change)(struct sniffer_owner *owner,
							const struct sock *sk, int oldstate,
							int newstate),
					 int oldstate, int newstate)
{
	u64 cookie = atomic64_read(&sk->sk_cookie);
	raw_spinlock_t *lock = sniffer_owner_lock(cookie);
	struct sniffer_owner *owner;
	unsigned long flags;

	if (!cookie)
		return;
	raw_spin_lock_irqsave(lock, flags);
	sniffer_owner_change(lock);
	owner = sniffer_owner_find(cookie);
	if (owner)
		change(owner, sk, oldstate, newstate);
	sniffer_owner_changed(lock);
	raw_spin_unlock_irqrestore(lock, flags);
}

static void owner_released(struct sniffer_owner *owner, const struct sock *sk, int oldstate,
			   int newstate)
{
	if (owner->via)
		return;
	/* the last bind may not have been seen */
	owner->port = owner->port ?: inet_sk(sk)->inet_num;
	/* without a port it never sent a packet; but an MPTCP parent's subflows may still send */
	if (!owner->port && sk->sk_protocol != IPPROTO_MPTCP) {
		sniffer_owner_remove(owner);
		return;
	}
	owner_let_go(owner);
	WRITE_ONCE(owner->sock, NULL);
	owner->released = true;
	owner_forget_all(owner);
}

/**
 * sniffer_owner_release - a socket loses its file, so no process has it any more
 * @sk: full socket; process context
 */
void sniffer_owner_release(struct sock *sk)
{
	owner_change(sk, owner_released, 0, 0);
}

static void owner_closed(struct sniffer_owner *owner, const struct sock *sk, int oldstate,
			 int newstate)
{
	const int waiting = TCPF_FIN_WAIT2 | TCPF_CLOSING | TCPF_TIME_WAIT;

	if (owner->via)
		return;
	owner->waits = newstate == TCP_CLOSE && 1 << oldstate & waiting;
	owner->listens = newstate == TCP_LISTEN;
	if (newstate != TCP_CLOSE)
		WRITE_ONCE(owner->dead, 0);
	else if (!sniffer_probes_alive())
		sniffer_owner_dies(owner);
}

/**
 * sniffer_owner_close_state - a TCP socket enters or leaves TCP_CLOSE
 * @sk: full socket; any context
 * @oldstate: its state so far
 * @newstate: its state from now on
 *
 * If its own FIN led to @oldstate, it may leave a TIME_WAIT. Where the end of sockets
 * is not seen, TCP_CLOSE counts as the end.
 */
void sniffer_owner_close_state(struct sock *sk, int oldstate, int newstate)
{
	owner_change(sk, owner_closed, oldstate, newstate);
}

static void owner_freed(struct sniffer_owner *owner, const struct sock *sk, int oldstate,
			int newstate)
{
	if (owner->released && !owner->port)
		sniffer_owner_remove(owner);
	else
		sniffer_owner_dies(owner);
}

/**
 * sniffer_owner_free - a socket is being freed
 * @sk: full socket; any context
 */
void sniffer_owner_free(struct sock *sk)
{
	u64 cookie = atomic64_read(&sk->sk_cookie);

	rcu_read_lock();
	if (cookie && sniffer_owner_find(cookie) && sniffer_owner_wants(sk))
		owner_change(sk, owner_freed, 0, 0);
	rcu_read_unlock();
}

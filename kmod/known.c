// SPDX-License-Identifier: GPL-2.0-only
/*
 * A socket call that tells nothing new: this thread used this socket on this CPU a moment
 * ago. The socket's entry in the owner table has not changed since. This file only
 * compares; any difference goes to use.c.
 */
#include <linux/compat.h>
#include <linux/cred.h>
#include <linux/hash.h>
#include <linux/percpu.h>
#include <linux/preempt.h>
#include <linux/sched/task_stack.h>
#include <asm/syscall.h>
#include <asm/unistd.h>
#include <net/inet_sock.h>

#include "alive.h"
#include "known.h"
#include "table.h"

#define KNOWN_BITS	4	/* sockets that a CPU remembers */

/*
 * Used with preemption off, never by interrupts. @owner may be dereferenced only if
 * @version still matches, see struct sniffer_stripe.
 */
struct known {
	u64 cookie;
	const struct sniffer_stripe *stripe;
	const struct socket *sock;
	const struct sniffer_owner *owner;
	u64 start_ns;
	unsigned int version;
	u32 pid;
	u32 uid;
	u16 num;
} ____cacheline_aligned;

static DEFINE_PER_CPU(struct known [1 << KNOWN_BITS], known_uses);

/*
 * A process that does not have a certain socket. This avoids a search for each packet
 * that a firewall's daemon or the user of a network disk handles. A torn read matches
 * nothing, or costs one search.
 */
struct known_stranger {
	u64 cookie;
	u64 start_ns;
	u32 tgid;
	u32 gains;
};

/* Sockets whose packets one process judges in turn, by a hash. */
static DEFINE_PER_CPU(struct known_stranger [1 << KNOWN_BITS], known_strangers);

static struct known *known_of(u64 cookie)
{
	return this_cpu_ptr(known_uses) + (cookie & ((1 << KNOWN_BITS) - 1));
}

/**
 * sniffer_known - is nothing new to learn from current's use of a socket?
 * @sk: full socket
 *
 * In process context.
 */
bool sniffer_known(const struct sock *sk)
{
	u64 cookie = atomic64_read(&sk->sk_cookie);
	const struct task_struct *task = current;
	const struct known *known;
	bool same;

	preempt_disable_notrace();
	known = known_of(cookie);
	same = known->cookie == cookie && known->stripe &&
	       known->version == sniffer_owner_version(known->stripe) &&
	       known->pid == task->pid &&
	       known->start_ns == task->group_leader->start_boottime &&
	       known->sock == READ_ONCE(sk->sk_socket) && known->num == inet_sk(sk)->inet_num &&
	       known->uid == __kuid_val(current_uid()) && sniffer_probes_alive() &&
	       READ_ONCE(known->owner->tid) == known->pid;
	preempt_enable_notrace();
	return same;
}

/**
 * sniffer_known_keep - remember that current's use of a socket told nothing new
 * @sk: full socket
 * @owner: its entry, under RCU
 * @version: of @owner, read before @owner was looked up
 *
 * Remembered from the second time on: many a socket is not used that often here.
 */
void sniffer_known_keep(const struct sock *sk, struct sniffer_owner *owner, unsigned int version)
{
	struct known *known;

	if (version & 1 || !in_task())
		return;
	preempt_disable_notrace();
	known = known_of(owner->cookie);
	if (known->cookie != owner->cookie) {
		known->cookie = owner->cookie;
		known->stripe = NULL;
		goto out;
	}
	known->stripe = sniffer_owner_stripe(owner->cookie);
	known->version = version;
	known->owner = owner;
	known->sock = READ_ONCE(sk->sk_socket);
	known->start_ns = current->group_leader->start_boottime;
	known->pid = current->pid;
	known->uid = __kuid_val(current_uid());
	known->num = inet_sk(sk)->inet_num;
out:
	preempt_enable_notrace();
}

/**
 * sniffer_known_looks - does current's system call only look at a socket?
 *
 * While it holds the socket's lock, packets wait. They are another process's, though
 * this one then sends what they allow to send.
 */
bool sniffer_known_looks(void)
{
	if (current->flags & PF_IO_WORKER || in_compat_syscall())
		return false;
	switch (syscall_get_nr(current, task_pt_regs(current))) {
	case __NR_getsockopt:
	case __NR_getsockname:
	case __NR_getpeername:
	case __NR_ioctl:
		return true;
	}
	return false;
}

static struct known_stranger *known_stranger_of(u64 cookie)
{
	return &(*raw_cpu_ptr(&known_strangers))[hash_64(cookie, KNOWN_BITS)];
}

/**
 * sniffer_known_stranger - is current known not to have a socket?
 * @cookie: the socket's, 0: it has none
 * @gains: how many descriptors all processes have received so far
 */
bool sniffer_known_stranger(u64 cookie, u32 gains)
{
	const struct known_stranger *known = known_stranger_of(cookie);

	return cookie && READ_ONCE(known->cookie) == cookie && known->tgid == current->tgid &&
	       known->start_ns == current->group_leader->start_boottime && known->gains == gains;
}

/**
 * sniffer_known_keep_stranger - remember that current does not have a socket
 * @cookie: the socket's
 * @gains: as for sniffer_known_stranger()
 */
void sniffer_known_keep_stranger(u64 cookie, u32 gains)
{
	struct known_stranger *known = known_stranger_of(cookie);

	WRITE_ONCE(known->cookie, 0);
	known->tgid = current->tgid;
	known->start_ns = current->group_leader->start_boottime;
	known->gains = gains;
	WRITE_ONCE(known->cookie, cookie);
}

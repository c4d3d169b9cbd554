// SPDX-License-Identifier: GPL-2.0-only
/*
 * The owner table: socket cookie -> the process that its packets belong to.
 *
 * | state    | fields            | who is named                | left when                        |
 * |----------|-------------------|-----------------------------|----------------------------------|
 * | (none)   | no entry          | nobody, with a reason       | created, used, found at load; a  |
 * |          |                   |                             | handshake ends: VIA              |
 * | VIA      | via               | the listener's user, or the | accepted: HELD; 130 s            |
 * |          |                   | MPTCP parent's              |                                  |
 * | HELD     | user, held        | user                        | another one who has it uses or   |
 * |          |                   |                             | receives it: HELD, the old user  |
 * |          |                   |                             | joins the past; user lets go:    |
 * |          |                   |                             | settled                          |
 * | (settle) | user, held, file, | user, DEAD once he exited   | at once, in the context of who   |
 * |          | exit              |                             | let go: HELD by an heir; UNHELD  |
 * | UNHELD   | user, not held    | user, flagged DEAD          | somebody uses or receives it:    |
 * |          |                   |                             | HELD; its file goes: RELEASED    |
 * | RELEASED | released          | user, flagged DEAD          | freed                            |
 * | dead     | dead              | user, flagged DEAD          | 2 s, or 130 s after a state that |
 * |          |                   |                             | leaves a TIME_WAIT               |
 *
 * Rules, each measured on real traffic:
 * - the last process that used a socket and still has it owns its packets;
 * - who does not have a socket does not use it, whatever runs in its context;
 * - receiving a descriptor (SCM_RIGHTS, pidfd_getfd) is a use;
 * - who has a socket is not counted but looked up, in descriptor tables, when
 *   its user lets go (holders.c). The heir is the latest earlier user that still
 *   has it; else somebody who does, a guess that is flagged AMBIGUOUS while
 *   several do;
 * - an entry outlives its socket: TIME_WAIT and orphans still send.
 *
 * So fork, exec and exit cost nothing a socket, and memory is bounded by
 * max_sockets and max_processes alone.
 */
#include <linux/hash.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/rculist.h>
#include <linux/slab.h>
#include <linux/sock_diag.h>
#include <linux/tcp.h>
#include <linux/workqueue.h>
#include <net/tcp.h>

#include "compat.h"
#include "owner.h"
#include "probes.h"

#define OWNER_LOCKS	256
#define OWNER_KEEP	(2 * HZ)	/* what waited on its way */
/* FIN_WAIT2 and then TIME_WAIT, 60 s each, and some; a place in a listener's queue */
#define OWNER_KEEP_WAIT	(130 * HZ)
#define OWNER_KEEP_MIN	(5 * HZ)	/* when either table is nearly full */
#define OWNER_KEEP_IDLE	(600 * HZ)	/* unheld or, where not all is told, unused */
#define OWNER_SWEEP	60		/* seconds from sweep to sweep */

static unsigned int max_sockets = 262144;
module_param(max_sockets, uint, 0444);
MODULE_PARM_DESC(max_sockets, "sockets in the owner table, 64 to 16777216 (default 262144)");

static struct hlist_head *owner_cookies;
static struct hlist_head *owner_inodes;
static unsigned int owner_bits;

/*
 * Guard both indices' insertion and removal (an inode's bucket by the lock of
 * its own hash) and each owner's fields. Taken from probe handlers in process
 * context with interrupts possibly off, from the packet hooks (softirq) and
 * from the collector: irqsave. Under a cookie lock an inode's, a process's
 * and the dying ones' lock may be taken, never the reverse.
 */
static raw_spinlock_t owner_locks[OWNER_LOCKS];
static raw_spinlock_t owner_inode_locks[OWNER_LOCKS];

/*
 * Those that have ended, by the time of their end: they wait OWNER_KEEP, or
 * OWNER_KEEP_WAIT. The lock guards both lists and by_death; innermost, any
 * context: irqsave.
 */
static LIST_HEAD(owner_dying);
static LIST_HEAD(owner_waiting);
static DEFINE_RAW_SPINLOCK(owner_dying_lock);

static atomic_t owner_used;
static atomic_t owner_changes;		/* entries that came and went */
static atomic64_t owner_clock;		/* counts forks of processes that have sockets */
static atomic64_t owner_full;
static unsigned long owner_full_at;	/* jiffies | 1 of the last time, 0: never */
static struct kmem_cache *owner_cache;
static void owner_collect(struct work_struct *work);
static DECLARE_DELAYED_WORK(owner_collector, owner_collect);

static struct hlist_head *owner_bucket(u64 cookie)
{
	return &owner_cookies[hash_64(cookie, owner_bits)];
}

/**
 * sniffer_owner_lock - the lock of a socket's entry
 * @cookie: socket cookie
 */
raw_spinlock_t *sniffer_owner_lock(u64 cookie)
{
	return &owner_locks[hash_64(cookie, owner_bits) % OWNER_LOCKS];
}

/**
 * sniffer_owner_count_full - a socket or a process found no room
 */
void sniffer_owner_count_full(void)
{
	atomic64_inc(&owner_full);
	if (READ_ONCE(owner_full_at) != (jiffies | 1))
		WRITE_ONCE(owner_full_at, jiffies | 1);
}

/**
 * sniffer_owner_wants - is this a socket that the table is about?
 * @sk: any full socket
 *
 * Return: true for TCP, UDP and MPTCP sockets of user space.
 */
bool sniffer_owner_wants(const struct sock *sk)
{
	if (sk->sk_family != AF_INET && sk->sk_family != AF_INET6)
		return false;
	if (sk->sk_kern_sock)
		return false;
	return sk->sk_protocol == IPPROTO_TCP || sk->sk_protocol == IPPROTO_UDP ||
	       sk->sk_protocol == IPPROTO_MPTCP || sk->sk_type == SOCK_RAW;
}

/**
 * sniffer_owner_cookie - a socket's cookie, generated if it has none
 * @sk: any socket, also a request or TIME_WAIT one
 */
u64 sniffer_owner_cookie(struct sock *sk)
{
	u64 cookie = atomic64_read(&sk->sk_cookie);
	u32 halves[2];

	if (likely(cookie))
		return cookie;
	sock_diag_save_cookie(sk, halves);
	return (u64)halves[1] << 32 | halves[0];
}

/**
 * sniffer_owner_find - look a socket up
 * @cookie: socket cookie
 *
 * Return: the entry or NULL; valid in the caller's RCU section.
 */
struct sniffer_owner *sniffer_owner_find(u64 cookie)
{
	struct sniffer_owner *owner;

	hlist_for_each_entry_rcu(owner, owner_bucket(cookie), by_cookie)
		if (owner->cookie == cookie)
			return owner;
	return NULL;
}

/**
 * sniffer_owner_find_inode - look a socket up by inode
 * @inode: socket inode, not 0
 *
 * MPTCP subflows share the inode of their parent, not its cookie.
 *
 * Return: the entry or NULL; valid in the caller's RCU section.
 */
struct sniffer_owner *sniffer_owner_find_inode(u64 inode)
{
	struct sniffer_owner *owner;

	hlist_for_each_entry_rcu(owner, &owner_inodes[hash_64(inode, owner_bits)], by_inode)
		if (READ_ONCE(owner->inode) == inode && !READ_ONCE(owner->dead))
			return owner;
	return NULL;
}

static void owner_index_inode(struct sniffer_owner *owner, u64 inode)
{
	raw_spinlock_t *lock;
	unsigned long flags;

	if (!inode || owner->inode)
		return;
	WRITE_ONCE(owner->inode, inode);
	lock = &owner_inode_locks[hash_64(inode, owner_bits) % OWNER_LOCKS];
	raw_spin_lock_irqsave(lock, flags);
	hlist_add_head_rcu(&owner->by_inode, &owner_inodes[hash_64(inode, owner_bits)]);
	raw_spin_unlock_irqrestore(lock, flags);
}

static void owner_unindex_inode(struct sniffer_owner *owner)
{
	raw_spinlock_t *lock;
	unsigned long flags;

	if (!owner->inode)
		return;
	lock = &owner_inode_locks[hash_64(owner->inode, owner_bits) % OWNER_LOCKS];
	raw_spin_lock_irqsave(lock, flags);
	hlist_del_rcu(&owner->by_inode);
	raw_spin_unlock_irqrestore(lock, flags);
}

static void owner_note_address(struct sniffer_owner *owner, const struct sock *sk)
{
	owner->port = inet_sk(sk)->inet_num;
	if (sk->sk_family == AF_INET)
		memcpy(owner->addr, &inet_sk(sk)->inet_rcv_saddr, 4);
#if IS_ENABLED(CONFIG_IPV6)
	else
		memcpy(owner->addr, &sk->sk_v6_rcv_saddr, 16);
#endif
}

static struct sniffer_owner *owner_alloc(struct sock *sk, u64 cookie)
{
	struct sniffer_owner *owner = NULL;

	if (atomic_read(&owner_used) < max_sockets)
		owner = kmem_cache_zalloc(owner_cache, GFP_ATOMIC | __GFP_NOWARN);
	if (!owner) {
		sniffer_owner_count_full();
		return NULL;
	}
	owner->cookie = cookie;
	owner->netns = sock_net(sk)->ns.inum;
	owner->family = sk->sk_family;
	owner->fd = -1;
	INIT_LIST_HEAD(&owner->by_user);
	INIT_LIST_HEAD(&owner->by_death);
	/* a request socket, TCP's only kind that is not full, has no sk_protocol */
	owner->proto = sk_fullsock(sk) && sk->sk_protocol == IPPROTO_UDP ? IPPROTO_UDP :
									   IPPROTO_TCP;
	return owner;
}

/* Under the cookie's lock. */
static void owner_insert(struct sniffer_owner *fresh)
{
	hlist_add_head_rcu(&fresh->by_cookie, owner_bucket(fresh->cookie));
	atomic_inc(&owner_used);
	atomic_inc(&owner_changes);
}

/* Under the cookie's lock: its user has it no longer, as far as is known. */
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

/* Under the cookie's lock: @proc is not among the earlier users any more. */
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

/*
 * Under the cookie's lock: @proc has it, and is named. Takes over no reference.
 * Who was the user before may still have it if he is @kept.
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

/**
 * sniffer_owner_gain - a process uses or has got a socket
 * @sk: full socket
 * @gain: who, and how
 *
 * It becomes the socket's creator where that is new, or was not accepted so far.
 * Of several that had it at load and were not seen to use it the last one told
 * is named.
 */
void sniffer_owner_gain(struct sock *sk, const struct sniffer_gain *gain)
{
	u64 cookie = sniffer_owner_cookie(sk);
	raw_spinlock_t *lock = sniffer_owner_lock(cookie);
	struct sniffer_owner *owner, *fresh = NULL;
	bool seeded = gain->flags & SNIFFER_F_SEEDED;
	struct sniffer_proc *user;
	unsigned long flags;
	bool known;

	rcu_read_lock();
	if (!sniffer_owner_find(cookie))
		fresh = owner_alloc(sk, cookie);
	raw_spin_lock_irqsave(lock, flags);
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
		owner->since = sniffer_owner_tick();
	if (gain->many || (user && user != gain->proc) || gain->flags & SNIFFER_F_INHERITED)
		WRITE_ONCE(owner->many, true);
	/* set once its release has been told it would never be cleared again */
	if (gain->file && !owner->released)
		WRITE_ONCE(owner->file, gain->file);
	if (!user || !seeded || owner->guess) {
		if (gain->flags)
			WRITE_ONCE(owner->flags, (owner->flags & ~SNIFFER_F_INHERITED) |
				   gain->flags);
		owner_set_user(owner, gain->proc, true);
		WRITE_ONCE(owner->tid, gain->tid);
		WRITE_ONCE(owner->guess, seeded);
		owner->ring = gain->ring;
		if (gain->fd >= 0)
			owner->fd = gain->fd;
	}
	/*
	 * The hooks read without the lock: only now that there is a user may
	 * they find the entry, or stop asking the listener.
	 */
	if (owner->via) {
		WRITE_ONCE(owner->dead, 0);
		smp_store_release(&owner->via, 0);	/* pairs with hooks.c */
	}
	if (!known) {
		owner_insert(owner);
		fresh = NULL;
	}
	owner_index_inode(owner, gain->inode);
out:
	raw_spin_unlock_irqrestore(lock, flags);
	rcu_read_unlock();
	if (fresh)
		kmem_cache_free(owner_cache, fresh);
}

/**
 * sniffer_owner_inherit - the user of a socket has let go of it
 * @cookie: the socket's
 * @from: its user so far
 * @file: its file when that was found out
 * @heir: who has it now, NULL: nobody
 * @fd: a descriptor of it that @heir has
 * @past: @heir was seen to use it once
 *
 * Return: false when all this is out of date.
 */
bool sniffer_owner_inherit(u64 cookie, const struct sniffer_proc *from, const struct file *file,
			   struct sniffer_proc *heir, int fd, bool past)
{
	raw_spinlock_t *lock = sniffer_owner_lock(cookie);
	struct sniffer_owner *owner;
	unsigned long flags;
	bool valid;

	raw_spin_lock_irqsave(lock, flags);
	owner = sniffer_owner_find(cookie);
	valid = owner && rcu_access_pointer(owner->user) == from && owner->held &&
		owner->file == file;
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
	raw_spin_unlock_irqrestore(lock, flags);
	return valid;
}

/**
 * sniffer_owner_shared - may another process than its user have a socket?
 * @owner: the entry, under RCU
 * @user: its user
 *
 * Never false when one does. A descriptor on its way to another process, and a
 * thread that waits in a call, count as one.
 */
bool sniffer_owner_shared(const struct sniffer_owner *owner, const struct sniffer_proc *user)
{
	struct file *file;

	if (!READ_ONCE(owner->many) && (s64)(READ_ONCE(user->forked) - owner->since) <= 0)
		return false;
	file = READ_ONCE(owner->file);
	return file && file_count(file) > 1;
}

/**
 * sniffer_owner_tick - the time of an event, in forks of processes with sockets
 */
u64 sniffer_owner_tick(void)
{
	return atomic64_inc_return(&owner_clock);
}

/* Under the cookie's lock: it ends now, and is collected when that is long enough ago. */
static void owner_dies(struct sniffer_owner *owner)
{
	unsigned long flags;

	WRITE_ONCE(owner->dead, jiffies | 1);
	raw_spin_lock_irqsave(&owner_dying_lock, flags);
	list_move_tail(&owner->by_death,
		       owner->via || owner->waits ? &owner_waiting : &owner_dying);
	raw_spin_unlock_irqrestore(&owner_dying_lock, flags);
}

/**
 * sniffer_owner_refer - a socket's packets belong to another socket's owner
 * @sk: request socket whose handshake this packet completes, or MPTCP subflow
 * @via: cookie of the listener or of the MPTCP parent, which is in the table
 * @how: SNIFFER_HOW_LISTENER or SNIFFER_HOW_INODE
 *
 * The child of a request takes its cookie over, and with it this entry. A SYN
 * alone makes none, so that a flood of them cannot fill the table.
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
		fresh = owner_alloc(sk, cookie);
	raw_spin_lock_irqsave(lock, flags);
	owner = sniffer_owner_find(cookie);
	if (!owner && fresh) {
		owner = fresh;
		fresh = NULL;
		owner->via = via;
		owner->via_how = how;
		owner_insert(owner);
		/* such sockets end unseen: forget it in time unless it is accepted */
		owner_dies(owner);
	} else if (owner && owner->via) {
		WRITE_ONCE(owner->via, via);
		WRITE_ONCE(owner->via_how, how);
		owner_dies(owner);
	}
	raw_spin_unlock_irqrestore(lock, flags);
	if (fresh)
		kmem_cache_free(owner_cache, fresh);
}

/**
 * sniffer_owner_release - a socket loses its file: nobody has it any more
 * @sk: full socket; process context
 */
void sniffer_owner_release(struct sock *sk)
{
	u64 cookie = atomic64_read(&sk->sk_cookie);
	raw_spinlock_t *lock = sniffer_owner_lock(cookie);
	struct sniffer_owner *owner;
	unsigned long flags;

	if (!cookie)
		return;
	raw_spin_lock_irqsave(lock, flags);
	owner = sniffer_owner_find(cookie);
	if (owner && !owner->via) {
		owner_let_go(owner);
		WRITE_ONCE(owner->file, NULL);
		owner->released = true;
		while (owner->past[0])
			owner_forget(owner, owner->past[0]);
	}
	raw_spin_unlock_irqrestore(lock, flags);
}

/**
 * sniffer_owner_close_state - a TCP socket goes to TCP_CLOSE, or out of it
 * @sk: full socket; any context
 * @oldstate: its state so far
 * @newstate: from now on
 *
 * One that ends out of a state which its own FIN led to may leave a TIME_WAIT
 * behind. Where the end of sockets is not told, this is taken for it.
 */
void sniffer_owner_close_state(struct sock *sk, int oldstate, int newstate)
{
	const int waiting = TCPF_FIN_WAIT2 | TCPF_CLOSING | TCPF_TIME_WAIT;
	u64 cookie = atomic64_read(&sk->sk_cookie);
	raw_spinlock_t *lock = sniffer_owner_lock(cookie);
	struct sniffer_owner *owner;
	unsigned long flags;

	if (!cookie)
		return;
	raw_spin_lock_irqsave(lock, flags);
	owner = sniffer_owner_find(cookie);
	if (owner && !owner->via) {
		owner->waits = newstate == TCP_CLOSE && 1 << oldstate & waiting;
		if (newstate != TCP_CLOSE)
			WRITE_ONCE(owner->dead, 0);
		else if (!sniffer_probes_alive())
			owner_dies(owner);
	}
	raw_spin_unlock_irqrestore(lock, flags);
}

/**
 * sniffer_owner_free - a socket is being freed
 * @sk: full socket; any context
 */
void sniffer_owner_free(struct sock *sk)
{
	u64 cookie = atomic64_read(&sk->sk_cookie);
	raw_spinlock_t *lock = sniffer_owner_lock(cookie);
	struct sniffer_owner *owner;
	unsigned long flags;

	if (!cookie || !sniffer_owner_wants(sk))
		return;
	raw_spin_lock_irqsave(lock, flags);
	owner = sniffer_owner_find(cookie);
	if (owner)
		owner_dies(owner);
	raw_spin_unlock_irqrestore(lock, flags);
}

/**
 * sniffer_owner_next - walk the table for a dump
 * @bucket: where the walk stands; 0 at first
 * @index: the same within the bucket
 *
 * Return: the next entry or NULL at the end; under RCU.
 */
struct sniffer_owner *sniffer_owner_next(unsigned int *bucket, unsigned int *index)
{
	struct sniffer_owner *owner;
	unsigned int i;

	for (; *bucket < 1U << owner_bits; (*bucket)++, *index = 0) {
		i = 0;
		hlist_for_each_entry_rcu(owner, &owner_cookies[*bucket], by_cookie)
			if (i++ == *index) {
				(*index)++;
				return owner;
			}
	}
	return NULL;
}

/**
 * sniffer_owner_count - sockets in the table now
 */
unsigned int sniffer_owner_count(void)
{
	return atomic_read(&owner_used);
}

/**
 * sniffer_owner_generation - changes whenever an entry comes or goes
 */
unsigned int sniffer_owner_generation(void)
{
	return atomic_read(&owner_changes);
}

/**
 * sniffer_owner_max - sockets that the table can take
 */
unsigned int sniffer_owner_max(void)
{
	return max_sockets;
}

/**
 * sniffer_owner_full - how often a socket or process found no room
 */
u64 sniffer_owner_full(void)
{
	return atomic64_read(&owner_full);
}

/**
 * sniffer_owner_is_full - did one find no room so lately that its packets may still come?
 */
bool sniffer_owner_is_full(void)
{
	unsigned long at = READ_ONCE(owner_full_at);

	return at && time_before(jiffies, at + OWNER_KEEP_WAIT);
}

static void owner_free_rcu(struct rcu_head *rcu)
{
	kmem_cache_free(owner_cache, container_of(rcu, struct sniffer_owner, rcu));
}

/* Under the cookie's lock, or when nobody else is left. */
static void owner_remove(struct sniffer_owner *owner)
{
	unsigned long flags;

	hlist_del_rcu(&owner->by_cookie);
	owner_unindex_inode(owner);
	owner_let_go(owner);
	while (owner->past[0])
		owner_forget(owner, owner->past[0]);
	raw_spin_lock_irqsave(&owner_dying_lock, flags);
	list_del_init(&owner->by_death);
	raw_spin_unlock_irqrestore(&owner_dying_lock, flags);
	/* the hooks may still read it: freed after a grace period, as the entry is */
	sniffer_process_put(rcu_dereference_protected(owner->user, true));
	atomic_dec(&owner_used);
	atomic_inc(&owner_changes);
	call_rcu(&owner->rcu, owner_free_rcu);
}

/* The first of @list if it ended @keep ago, or has come to life again. */
static u64 owner_next_dead(struct list_head *list, unsigned long keep)
{
	struct sniffer_owner *owner;
	unsigned long flags, dead;
	u64 cookie = 0;

	raw_spin_lock_irqsave(&owner_dying_lock, flags);
	owner = list_first_entry_or_null(list, struct sniffer_owner, by_death);
	dead = owner ? READ_ONCE(owner->dead) : 0;
	if (owner && (!dead || time_after(jiffies, dead + keep)))
		cookie = owner->cookie;
	raw_spin_unlock_irqrestore(&owner_dying_lock, flags);
	return cookie;
}

static void owner_collect_dead(struct list_head *list, unsigned long keep)
{
	struct sniffer_owner *owner;
	raw_spinlock_t *lock;
	unsigned long flags;
	u64 cookie;

	while ((cookie = owner_next_dead(list, keep))) {
		lock = sniffer_owner_lock(cookie);
		raw_spin_lock_irqsave(lock, flags);
		owner = sniffer_owner_find(cookie);
		if (owner && !owner->dead) {
			raw_spin_lock(&owner_dying_lock);
			list_del_init(&owner->by_death);
			raw_spin_unlock(&owner_dying_lock);
		} else if (owner && time_after(jiffies, owner->dead + keep)) {
			owner_remove(owner);
		}
		raw_spin_unlock_irqrestore(lock, flags);
		cond_resched();
	}
}

/*
 * Those whose end was not told: unheld for long and not seen since, or, where
 * not every probe fires, unused for long.
 */
static void owner_sweep(void)
{
	bool blind = !sniffer_probes_alive();
	struct sniffer_owner *owner;
	struct hlist_node *next;
	unsigned long flags;
	unsigned int i;

	for (i = 0; i < 1U << owner_bits; i++) {
		raw_spinlock_t *lock = &owner_locks[i % OWNER_LOCKS];

		if (!(i % 1024))
			cond_resched();
		if (hlist_empty(&owner_cookies[i]))
			continue;
		raw_spin_lock_irqsave(lock, flags);
		hlist_for_each_entry_safe(owner, next, &owner_cookies[i], by_cookie)
			if (!owner->dead && !owner->file && (blind || !owner->held) &&
			    time_after(jiffies, owner->seen + OWNER_KEEP_IDLE))
				owner_remove(owner);
		raw_spin_unlock_irqrestore(lock, flags);
	}
}

static void owner_collect(struct work_struct *work)
{
	static unsigned int ticks;
	bool tight = atomic_read(&owner_used) > max_sockets / 4 * 3 || sniffer_process_tight();
	struct sniffer_proc *orphan;

	owner_collect_dead(&owner_dying, OWNER_KEEP);
	owner_collect_dead(&owner_waiting, tight ? OWNER_KEEP_MIN : OWNER_KEEP_WAIT);
	if (++ticks % OWNER_SWEEP == 0)
		owner_sweep();
	/* its work found no memory */
	while ((orphan = sniffer_process_orphan())) {
		sniffer_holders_settle_process(orphan, true);
		sniffer_process_put(orphan);
	}
	sniffer_process_collect();
	schedule_delayed_work(&owner_collector, HZ);
}

int sniffer_owner_init(void)
{
	unsigned int i;
	int err = -ENOMEM;

	if (max_sockets < 64 || max_sockets > 1 << 24) {
		pr_err("sniffer: max_sockets must be 64 to 16777216, not %u\n", max_sockets);
		return -EINVAL;
	}
	owner_bits = max_t(unsigned int, ilog2(roundup_pow_of_two(max_sockets)) - 1, 8);
	for (i = 0; i < OWNER_LOCKS; i++) {
		raw_spin_lock_init(&owner_locks[i]);
		raw_spin_lock_init(&owner_inode_locks[i]);
	}
	owner_cookies = kvcalloc(1U << owner_bits, sizeof(*owner_cookies), GFP_KERNEL);
	if (!owner_cookies)
		return err;
	owner_inodes = kvcalloc(1U << owner_bits, sizeof(*owner_inodes), GFP_KERNEL);
	if (!owner_inodes)
		goto free_cookies;
	owner_cache = kmem_cache_create("sniffer_owner", sizeof(struct sniffer_owner), 0,
					SLAB_HWCACHE_ALIGN, NULL);
	if (!owner_cache)
		goto free_inodes;
	schedule_delayed_work(&owner_collector, HZ);
	return 0;

free_inodes:
	kvfree(owner_inodes);
free_cookies:
	kvfree(owner_cookies);
	return err;
}

/* Hooks, probes and readers are gone. */
void sniffer_owner_exit(void)
{
	struct sniffer_owner *owner;
	struct hlist_node *next;
	unsigned int i;

	cancel_delayed_work_sync(&owner_collector);
	for (i = 0; i < 1U << owner_bits; i++)
		hlist_for_each_entry_safe(owner, next, &owner_cookies[i], by_cookie)
			owner_remove(owner);
	rcu_barrier();
	kmem_cache_destroy(owner_cache);
	kvfree(owner_inodes);
	kvfree(owner_cookies);
}

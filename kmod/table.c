// SPDX-License-Identifier: GPL-2.0-only
/*
 * The owner table: an entry for each socket, found by cookie or inode. owner.c says
 * what entries mean and when they change.
 */
#include <linux/hash.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/rculist.h>
#include <linux/mm.h>
#include <linux/sock_diag.h>

#include "process.h"
#include "table.h"

static unsigned int max_sockets = 262144;
module_param(max_sockets, uint, 0444);
MODULE_PARM_DESC(max_sockets, "the most sockets in the owner table, 64 to 16777216 (default 262144)");

/* See table.h. Set at load only. */
struct hlist_head *sniffer_owner_cookies;
unsigned int sniffer_owner_bits;

static struct hlist_head *owner_inodes;

/*
 * These locks guard insertion into both indices, removal from them, and each entry's
 * fields. An inode's bucket has the lock of its own hash. They are taken by probe
 * handlers (process context, perhaps with interrupts off), by packet hooks (softirq) and
 * by the collector: irqsave. Order: a cookie's lock is the outer one; those of an inode,
 * a process and the dying entries are inner ones.
 */
struct sniffer_stripe sniffer_owner_stripes[SNIFFER_OWNER_STRIPES];
static raw_spinlock_t owner_inode_locks[SNIFFER_OWNER_STRIPES];

/*
 * Entries whose socket has ended, in order of that time. Those in the second list may
 * have left a TIME_WAIT. The lock guards both lists and by_death. Innermost, any
 * context: irqsave.
 */
static LIST_HEAD(owner_dying);
static LIST_HEAD(owner_waiting);
static DEFINE_RAW_SPINLOCK(owner_dying_lock);

static atomic_t owner_used;		/* entries in the table */
static atomic_t owner_changes;		/* changes with each entry that comes or goes */
static atomic64_t owner_full;		/* how often there was no room */
static unsigned long owner_full_at;	/*
 * jiffies
 * 1 of the last time, 0: never. Any context writes it
 */

/**
 * sniffer_owner_count_full - count a socket or process that found no room
 */
void sniffer_owner_count_full(void)
{
	atomic64_inc(&owner_full);
	if (READ_ONCE(owner_full_at) != (jiffies | 1))
		WRITE_ONCE(owner_full_at, jiffies | 1);
}

/**
 * sniffer_owner_new_cookie - give a socket its cookie
 * @sk: any socket, even a request or a TIME_WAIT
 */
u64 sniffer_owner_new_cookie(struct sock *sk)
{
	u32 halves[2];

	sock_diag_save_cookie(sk, halves);
	return (u64)halves[1] << 32 | halves[0];
}

/**
 * sniffer_owner_find_inode - find an entry by inode
 * @inode: socket inode, not 0
 *
 * MPTCP subflows share the inode of their parent, not its cookie.
 *
 * Return: the entry or NULL; valid in the caller's RCU section.
 */
struct sniffer_owner *sniffer_owner_find_inode(u64 inode)
{
	struct sniffer_owner *owner;

	hlist_for_each_entry_rcu(owner, &owner_inodes[hash_64(inode, sniffer_owner_bits)], by_inode)
		if (READ_ONCE(owner->inode) == inode && !READ_ONCE(owner->dead))
			return owner;
	return NULL;
}

/**
 * sniffer_owner_index_inode - enter an entry into the inode index too
 * @owner: under the cookie's lock
 * @inode: the socket's inode; 0: none yet
 */
void sniffer_owner_index_inode(struct sniffer_owner *owner, u64 inode)
{
	raw_spinlock_t *lock;
	unsigned long flags;

	if (!inode || owner->inode)
		return;
	WRITE_ONCE(owner->inode, inode);
	/* only with MPTCP do several sockets have one inode */
	if (owner->proto == IPPROTO_UDP)
		return;
	lock = &owner_inode_locks[hash_64(inode, sniffer_owner_bits) % SNIFFER_OWNER_STRIPES];
	raw_spin_lock_irqsave(lock, flags);
	hlist_add_head_rcu(&owner->by_inode, &owner_inodes[hash_64(inode, sniffer_owner_bits)]);
	raw_spin_unlock_irqrestore(lock, flags);
}

static void owner_unindex_inode(struct sniffer_owner *owner)
{
	raw_spinlock_t *lock;
	unsigned long flags;

	if (hlist_unhashed(&owner->by_inode))
		return;
	lock = &owner_inode_locks[hash_64(owner->inode, sniffer_owner_bits) % SNIFFER_OWNER_STRIPES];
	raw_spin_lock_irqsave(lock, flags);
	hlist_del_rcu(&owner->by_inode);
	raw_spin_unlock_irqrestore(lock, flags);
}

/**
 * sniffer_owner_alloc - make an entry, in no index yet
 * @sk: the socket, of any kind
 * @cookie: its cookie
 *
 * Return: the entry, or NULL when the table is full or memory is short; both are
 * counted.
 */
struct sniffer_owner *sniffer_owner_alloc(struct sock *sk, u64 cookie)
{
	struct sniffer_owner *owner = NULL;

	if (atomic_read(&owner_used) < max_sockets)
		owner = sniffer_spare_take();
	if (!owner) {
		sniffer_owner_count_full();
		return NULL;
	}
	/* its size is known here: zeroed by words */
	*owner = (struct sniffer_owner){
		.cookie = cookie,
		.netns = sock_net(sk)->ns.inum,
		.family = sk->sk_family,
		.fd = -1,
		/* a request socket, TCP's only kind that is not full, has no sk_protocol */
		.proto = sk_fullsock(sk) && sk->sk_protocol == IPPROTO_UDP ? IPPROTO_UDP :
									     IPPROTO_TCP,
	};
	INIT_LIST_HEAD(&owner->by_user);
	INIT_LIST_HEAD(&owner->by_death);
	return owner;
}

/**
 * sniffer_owner_drop - free an entry that nobody has seen
 * @fresh: from sniffer_owner_alloc(); may be NULL
 */
void sniffer_owner_drop(struct sniffer_owner *fresh)
{
	if (fresh)
		sniffer_spare_put(&fresh->spare);
}

/**
 * sniffer_owner_insert - enter an entry into the cookie index, where hooks find it
 * @fresh: from sniffer_owner_alloc(), under the cookie's lock
 */
void sniffer_owner_insert(struct sniffer_owner *fresh)
{
	hlist_add_head_rcu(&fresh->by_cookie, sniffer_owner_bucket_of(fresh->cookie));
	atomic_inc(&owner_used);
	atomic_inc(&owner_changes);
}

/**
 * sniffer_owner_dies - mark an entry as ended, so that it is collected later
 * @owner: under the cookie's lock
 */
void sniffer_owner_dies(struct sniffer_owner *owner)
{
	unsigned long flags;

	WRITE_ONCE(owner->dead, jiffies | 1);
	raw_spin_lock_irqsave(&owner_dying_lock, flags);
	list_move_tail(&owner->by_death,
		       owner->via || owner->waits ? &owner_waiting : &owner_dying);
	raw_spin_unlock_irqrestore(&owner_dying_lock, flags);
}

/**
 * sniffer_owner_lives - undo sniffer_owner_dies()
 * @owner: under the cookie's lock
 */
void sniffer_owner_lives(struct sniffer_owner *owner)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&owner_dying_lock, flags);
	list_del_init(&owner->by_death);
	raw_spin_unlock_irqrestore(&owner_dying_lock, flags);
}

/**
 * sniffer_owner_next_dead - find the entry that ended first
 * @waiting: among entries that may have left a TIME_WAIT
 * @keep: only if it ended at least so many jiffies ago, or was revived
 *
 * Return: its cookie, 0: none.
 */
u64 sniffer_owner_next_dead(bool waiting, unsigned long keep)
{
	struct list_head *list = waiting ? &owner_waiting : &owner_dying;
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

/**
 * sniffer_owner_unlink - take an entry out of the table
 * @owner: without earlier users, in nobody's list; under the cookie's lock, or
 *	when nobody else is left
 */
void sniffer_owner_unlink(struct sniffer_owner *owner)
{
	hlist_del_rcu(&owner->by_cookie);
	owner_unindex_inode(owner);
	/* only code under the cookie's lock puts it into a list */
	if (!list_empty(&owner->by_death))
		sniffer_owner_lives(owner);
	/* hooks may still read it: the reference is dropped after a grace period, like the entry */
	sniffer_process_put(rcu_dereference_protected(owner->user, true));
	atomic_dec(&owner_used);
	atomic_inc(&owner_changes);
	sniffer_spare_put_later(&owner->spare);
}

/**
 * sniffer_owner_bucket - walk the buckets of the table
 * @i: number of the bucket, from 0
 * @lock: set to its lock
 *
 * Return: the bucket, or NULL after the last.
 */
struct hlist_head *sniffer_owner_bucket(unsigned int i, raw_spinlock_t **lock)
{
	if (i >= 1U << sniffer_owner_bits)
		return NULL;
	*lock = &sniffer_owner_stripes[i % SNIFFER_OWNER_STRIPES].lock;
	return &sniffer_owner_cookies[i];
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

	for (; *bucket < 1U << sniffer_owner_bits; (*bucket)++, *index = 0) {
		i = 0;
		hlist_for_each_entry_rcu(owner, &sniffer_owner_cookies[*bucket], by_cookie)
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
 * sniffer_owner_full - how often a socket or a process found no room
 */
u64 sniffer_owner_full(void)
{
	return atomic64_read(&owner_full);
}

/**
 * sniffer_owner_is_full - was there no room so recently that packets of that socket may
 * still come?
 */
bool sniffer_owner_is_full(void)
{
	unsigned long at = READ_ONCE(owner_full_at);

	return at && time_before(jiffies, at + SNIFFER_OWNER_WAIT);
}

/**
 * sniffer_owner_tight - is the owner table nearly full?
 */
bool sniffer_owner_tight(void)
{
	return atomic_read(&owner_used) > max_sockets / 4 * 3;
}

int sniffer_owner_init(void)
{
	unsigned int i;
	int err = -ENOMEM;

	if (max_sockets < 64 || max_sockets > 1 << 24) {
		pr_err("sniffer: max_sockets must be 64 to 16777216, not %u\n", max_sockets);
		return -EINVAL;
	}
	sniffer_owner_bits = max_t(unsigned int, ilog2(roundup_pow_of_two(max_sockets)) - 1, 8);
	for (i = 0; i < SNIFFER_OWNER_STRIPES; i++) {
		raw_spin_lock_init(&sniffer_owner_stripes[i].lock);
		raw_spin_lock_init(&owner_inode_locks[i]);
	}
	sniffer_owner_cookies = kvcalloc(1U << sniffer_owner_bits, sizeof(*sniffer_owner_cookies),
					 GFP_KERNEL);
	if (!sniffer_owner_cookies)
		return err;
	owner_inodes = kvcalloc(1U << sniffer_owner_bits, sizeof(*owner_inodes), GFP_KERNEL);
	if (!owner_inodes)
		goto free_cookies;
	if (!sniffer_spare_init(sizeof(struct sniffer_owner),
				offsetof(struct sniffer_owner, spare)))
		goto free_inodes;
	return 0;

free_inodes:
	kvfree(owner_inodes);
free_cookies:
	kvfree(sniffer_owner_cookies);
	return err;
}

/* Hooks, probes and readers are gone, and so are all entries. */
void sniffer_owner_exit(void)
{
	sniffer_spare_exit();
	kvfree(owner_inodes);
	kvfree(sniffer_owner_cookies);
}

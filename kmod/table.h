/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_TABLE_H
#define SNIFFER_TABLE_H

#include <linux/fs.h>
#include <linux/hash.h>
#include <linux/magic.h>
#include <linux/rculist.h>
#include <linux/spinlock.h>
#include <net/sock.h>

#include "alive.h"
#include "shared_proto.h"
#include "spare.h"

struct sniffer_proc;

#define SNIFFER_OWNER_PAST	3	/* earlier users of a socket that are remembered */
/* FIN_WAIT2 and then TIME_WAIT, 60 s each, and some; a place in a listener's queue */
#define SNIFFER_OWNER_WAIT	(130 * HZ)

/**
 * struct sniffer_owner - what is known of one socket
 * @by_cookie: in the cookie index
 * @cookie: socket cookie
 * @user: last process that used it and had it, with a reference; RCU
 * @via: cookie of the socket whose owner counts instead: the listener while
 *	nobody has accepted this one, the parent of an MPTCP subflow; else 0
 * @sock: the socket while it has a file or gets one. Read it under RCU, or under
 *	the lock: cleared before it is freed, and never set where that is not
 *	told for certain.
 * @since: owner_clock when @user got it
 * @tid: thread of last use
 * @flags: enum sniffer_flag as far as they belong to the socket
 * @port: local port when last used
 * @via_how: SNIFFER_HOW_LISTENER or SNIFFER_HOW_INODE, says which @via is
 * @held: as far as is known @user has it
 * @many: another process may have it, too; see also sniffer_owner_shared()
 * @guess: @user was never seen to use it, or somebody may have used it unseen since
 * @ring: @user has it by an io_uring, without a descriptor
 * @waits: its end may have left a TIME_WAIT, which sends on for a while
 * @released: nobody has it any more, and nobody will
 * @server: a server in the kernel has accepted it, or it was given to the kernel
 * @listens: a TCP listener: who uses it is told by accept() alone
 * @by_inode: in the inode index while @inode is not 0
 * @inode: socket inode, 0 before accept()
 * @creator: tgid that made or accepted it
 * @netns: inode of the socket's network namespace
 * @creator_start: start_boottime of @creator
 * @by_user: in @user's list while @held
 * @past: who used it before, latest first, with references
 * @by_death: in a list of those that end, once they do
 * @dead: jiffies | 1 when the socket was freed, or when @via was set; else 0
 * @seen: jiffies when last held; of last use while not every probe fires
 * @spare: once it has left the table; readers hold rcu_read_lock()
 * @fd: where a descriptor of it was seen last, in whatever table
 * @proto: IPPROTO_TCP or IPPROTO_UDP
 * @family: AF_INET or AF_INET6
 * @addr: local address when last used
 *
 * Everything is written under the lock of @cookie's bucket, but @tid, @seen and
 * @dead, which are single words; the hooks read without. The first members are
 * what a packet needs: one cache line and a half.
 */
struct sniffer_owner {
	struct hlist_node by_cookie;
	u64 cookie;
	struct sniffer_proc __rcu *user;
	u64 via;
	struct socket *sock;
	u64 since;
	u32 tid;
	u16 flags;
	u16 port;
	u8 via_how;
	bool held;
	bool many;
	bool guess;
	bool ring;
	bool waits;
	bool released;
	bool listens;
	bool server;
	/* colder */
	struct hlist_node by_inode;
	u64 inode;
	u32 creator;
	u32 netns;
	u64 creator_start;
	struct list_head by_user;
	struct sniffer_proc *past[SNIFFER_OWNER_PAST];
	struct list_head by_death;
	unsigned long dead;
	unsigned long seen;
	struct sniffer_spare spare;
	int fd;
	u8 proto;
	u8 family;
	u8 addr[16];
};

/* The cookie index, and the bits of its size. Private to the functions here and in table.c. */
extern struct hlist_head *sniffer_owner_cookies;
extern unsigned int sniffer_owner_bits;

#define SNIFFER_OWNER_STRIPES	256

/**
 * struct sniffer_stripe - entries whose cookies hash alike
 * @lock: guards them, see table.c
 * @version: grows whenever one of them changes, and is odd while one does. Written
 *	under @lock; who keeps what it has read of an entry, and finds the same
 *	version again under RCU, knows that nothing of it has changed but @tid,
 *	@seen and @fd, and that the entry and its user were not freed.
 */
struct sniffer_stripe {
	raw_spinlock_t lock;
	unsigned int version;
};

extern struct sniffer_stripe sniffer_owner_stripes[SNIFFER_OWNER_STRIPES];

u64 sniffer_owner_new_cookie(struct sock *sk);
struct sniffer_owner *sniffer_owner_find_inode(u64 inode);
struct sniffer_owner *sniffer_owner_alloc(struct sock *sk, u64 cookie);
void sniffer_owner_drop(struct sniffer_owner *fresh);
void sniffer_owner_insert(struct sniffer_owner *fresh);
void sniffer_owner_index_inode(struct sniffer_owner *owner, u64 inode);
void sniffer_owner_unlink(struct sniffer_owner *owner);
void sniffer_owner_dies(struct sniffer_owner *owner);
void sniffer_owner_lives(struct sniffer_owner *owner);
u64 sniffer_owner_next_dead(bool waiting, unsigned long keep);
struct hlist_head *sniffer_owner_bucket(unsigned int i, raw_spinlock_t **lock);
struct sniffer_owner *sniffer_owner_next(unsigned int *bucket, unsigned int *index);
unsigned int sniffer_owner_count(void);
unsigned int sniffer_owner_generation(void);
unsigned int sniffer_owner_max(void);
u64 sniffer_owner_full(void);
bool sniffer_owner_is_full(void);
void sniffer_owner_count_full(void);
bool sniffer_owner_tight(void);
int sniffer_owner_init(void);
void sniffer_owner_exit(void);

/*
 * Has the kernel given a socket of its own to a process, as the file of another
 * one? SMC does so where both ends cannot do better than TCP.
 */
static inline bool sniffer_owner_is_given(const struct sock *sk)
{
	const struct socket *sock = READ_ONCE(sk->sk_socket);

	return sk->sk_state != TCP_LISTEN && sock && READ_ONCE(sock->file);
}

/* Is this full socket one that the table is about: TCP, UDP, MPTCP or raw, of user space? */
static inline bool sniffer_owner_wants(const struct sock *sk)
{
	if (sk->sk_family != AF_INET && sk->sk_family != AF_INET6)
		return false;
	if (sk->sk_kern_sock && !sniffer_owner_is_given(sk))
		return false;
	return sk->sk_protocol == IPPROTO_TCP || sk->sk_protocol == IPPROTO_UDP ||
	       sk->sk_protocol == IPPROTO_MPTCP || sk->sk_type == SOCK_RAW;
}

/* What guards the entry with @cookie. */
static inline struct sniffer_stripe *sniffer_owner_stripe(u64 cookie)
{
	return &sniffer_owner_stripes[hash_64(cookie, sniffer_owner_bits) % SNIFFER_OWNER_STRIPES];
}

/* Its lock. */
static inline raw_spinlock_t *sniffer_owner_lock(u64 cookie)
{
	return &sniffer_owner_stripe(cookie)->lock;
}

/* Under @lock, before an entry is changed: nobody may believe any more what he has kept of it. */
static inline void sniffer_owner_change(raw_spinlock_t *lock)
{
	struct sniffer_stripe *stripe = container_of(lock, struct sniffer_stripe, lock);

	WRITE_ONCE(stripe->version, stripe->version + 1);
	smp_wmb();	/* with sniffer_owner_version() */
}

/* Under @lock, after it: what is read from now on may be kept. */
static inline void sniffer_owner_changed(raw_spinlock_t *lock)
{
	struct sniffer_stripe *stripe = container_of(lock, struct sniffer_stripe, lock);

	smp_store_release(&stripe->version, stripe->version + 1);
}

/* Read before an entry of @stripe is; odd: nothing of it may be kept. */
static inline unsigned int sniffer_owner_version(const struct sniffer_stripe *stripe)
{
	return smp_load_acquire(&stripe->version);
}

/* Where the entry with @cookie is, if there is one. */
static inline struct hlist_head *sniffer_owner_bucket_of(u64 cookie)
{
	return &sniffer_owner_cookies[hash_64(cookie, sniffer_owner_bits)];
}

/* Look a socket up. Return: the entry or NULL; valid in the caller's RCU section. */
static inline struct sniffer_owner *sniffer_owner_find(u64 cookie)
{
	struct sniffer_owner *owner;

	hlist_for_each_entry_rcu(owner, sniffer_owner_bucket_of(cookie), by_cookie)
		if (owner->cookie == cookie)
			return owner;
	return NULL;
}

/* The cookie of any socket, also a request or TIME_WAIT one; made if it has none. */
static inline u64 sniffer_owner_cookie(struct sock *sk)
{
	u64 cookie = atomic64_read(&sk->sk_cookie);

	return likely(cookie) ? cookie : sniffer_owner_new_cookie(sk);
}

/* Read a socket's inode; the caller is under RCU, under which inodes are freed. */
static inline u64 sniffer_owner_inode(const struct sock *sk)
{
	struct socket *sock = READ_ONCE(sk->sk_socket);

	return sock ? SOCK_INODE(sock)->i_ino : 0;
}

/* The file of @owner's socket while it has one; under RCU, or under the lock. */
static inline struct file *sniffer_owner_file(const struct sniffer_owner *owner)
{
	const struct socket *sock = READ_ONCE(owner->sock);

	/* what is not told of any more may be freed: see sniffer_probes_exit() */
	return sock && sniffer_probes_tell_release() ? READ_ONCE(sock->file) : NULL;
}

/*
 * The socket behind a file, if the table is about it, else NULL. Nothing but the
 * inode is touched of a file that is no socket's.
 */
static inline struct sock *sniffer_owner_sock(struct file *file)
{
	struct inode *inode = file_inode(file);
	struct sock *sk;

	if (inode->i_sb->s_magic != SOCKFS_MAGIC)
		return NULL;
	sk = READ_ONCE(SOCKET_I(inode)->sk);
	return sk && sniffer_owner_wants(sk) ? sk : NULL;
}

#endif /* SNIFFER_TABLE_H */

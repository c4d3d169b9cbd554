/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_TABLE_H
#define SNIFFER_TABLE_H

#include <linux/fs.h>
#include <linux/hash.h>
#include <linux/magic.h>
#include <linux/rculist.h>
#include <linux/spinlock.h>
#include <linux/tcp.h>
#include <net/mptcp.h>
#include <net/sock.h>

#include "alive.h"
#include "shared_proto.h"
#include "spare.h"

struct sniffer_proc;

#define SNIFFER_OWNER_PAST	3	/* earlier users that an entry remembers */
/* FIN_WAIT2 and TIME_WAIT, 60 s each, and a reserve; also the wait to be accepted */
#define SNIFFER_OWNER_WAIT	(130 * HZ)

/**
 * struct sniffer_owner - entry of one socket
 * @by_cookie: in the cookie index
 * @cookie: socket cookie
 * @user: its owner: the last process that used it and had it, with a reference; RCU
 * @via: cookie of the socket whose owner counts instead: of the listener until
 *	accept(), of the parent of an MPTCP subflow; else 0
 * @sock: the socket while it has a file or gets one. Read it under RCU or under the
 *	lock. It is cleared before the socket is freed, and stays NULL where the
 *	release is not surely seen.
 * @since: owner_clock when @user got it
 * @tid: thread of last use
 * @flags: enum sniffer_flag as far as they belong to the socket
 * @port: local port when last used
 * @via_how: SNIFFER_HOW_LISTENER or SNIFFER_HOW_INODE: what @via is
 * @held: @user has it, as far as is known
 * @many: another process may have it too; see sniffer_owner_shared()
 * @guess: @user was never seen to use it, or somebody may have used it unseen since
 * @ring: @user has it through an io_uring, without a descriptor
 * @waits: it may have left a TIME_WAIT, which still sends
 * @released: nobody has it, and nobody can get it
 * @server: a server in the kernel accepted it, a process gave it to the kernel, or the
 *	kernel has closed its own
 * @listens: a TCP listener; only accept() shows who uses it
 * @by_inode: in the inode index while @inode is not 0
 * @inode: socket inode, 0 before accept()
 * @creator: tgid that made or accepted it
 * @netns: inode of the socket's network namespace
 * @creator_start: start_boottime of @creator
 * @by_user: in @user's list while @held
 * @past: earlier users, latest first, with references
 * @by_death: in a list of ended entries, when it has ended
 * @dead: jiffies | 1 at which the socket was freed or @via was set; else 0
 * @seen: jiffies when it was last held; of its last use while a probe is missing
 * @spare: used when it has left the table; readers hold rcu_read_lock()
 * @fd: number of the last descriptor seen of it, in any table
 * @proto: IPPROTO_TCP or IPPROTO_UDP
 * @family: AF_INET or AF_INET6
 * @addr: local address when last used
 *
 * All but @tid, @seen and @dead is written under the lock of @cookie's bucket; these three
 * are single words. The hooks read without a lock. A packet needs only the first members:
 * one and a half cache lines.
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
	/* rarely used */
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

/* The cookie index and the bits of its size. Only for the functions here and in table.c. */
extern struct hlist_head *sniffer_owner_cookies;
extern unsigned int sniffer_owner_bits;

#define SNIFFER_OWNER_STRIPES	256

/**
 * struct sniffer_stripe - entries whose cookies hash alike
 * @lock: guards them, see table.c
 * @version: grows whenever one of them changes, and is odd while one does. Written
 *	under @lock. If a reader finds the same version again under RCU, the entry and
 *	its user were not freed, and only @tid, @seen and @fd may have changed.
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

/* Is this full socket one that the table is about: TCP, UDP, MPTCP or raw, of user space? */
static inline bool sniffer_owner_wants(const struct sock *sk)
{
	if (sk->sk_family != AF_INET && sk->sk_family != AF_INET6)
		return false;
	if (sk->sk_kern_sock)
		return false;
	return sk->sk_protocol == IPPROTO_TCP || sk->sk_protocol == IPPROTO_UDP ||
	       sk->sk_protocol == IPPROTO_MPTCP || sk->sk_type == SOCK_RAW;
}

/*
 * A socket of the kernel's own: flagged so, or without a file (nvmet and iSCSI create
 * theirs as a process does). MPTCP's subflows look the same, but are not the kernel's.
 * Their type tells them from the stack's control sockets, which are raw.
 */
static inline bool sniffer_owner_is_kernels(const struct sock *sk)
{
	const struct socket *sock = READ_ONCE(sk->sk_socket);

	if (!sk->sk_kern_sock && (!sock || READ_ONCE(sock->file)))
		return false;
	return !(sk->sk_type == SOCK_STREAM && sk->sk_protocol == IPPROTO_TCP && sk_is_mptcp(sk));
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

/* Under @lock, before an entry is changed: what was remembered of it no longer holds. */
static inline void sniffer_owner_change(raw_spinlock_t *lock)
{
	struct sniffer_stripe *stripe = container_of(lock, struct sniffer_stripe, lock);

	WRITE_ONCE(stripe->version, stripe->version + 1);
	smp_wmb();	/* pairs with sniffer_owner_version() */
}

/* Under @lock, after the change: what is read from now on may be remembered. */
static inline void sniffer_owner_changed(raw_spinlock_t *lock)
{
	struct sniffer_stripe *stripe = container_of(lock, struct sniffer_stripe, lock);

	smp_store_release(&stripe->version, stripe->version + 1);
}

/* Read this before an entry of @stripe. If it is odd, nothing of the entry may be remembered. */
static inline unsigned int sniffer_owner_version(const struct sniffer_stripe *stripe)
{
	return smp_load_acquire(&stripe->version);
}

/* The bucket of the entry with @cookie. */
static inline struct hlist_head *sniffer_owner_bucket_of(u64 cookie)
{
	return &sniffer_owner_cookies[hash_64(cookie, sniffer_owner_bits)];
}

/* Finds an entry by cookie. Return: the entry or NULL; valid in the caller's RCU section. */
static inline struct sniffer_owner *sniffer_owner_find(u64 cookie)
{
	struct sniffer_owner *owner;

	hlist_for_each_entry_rcu(owner, sniffer_owner_bucket_of(cookie), by_cookie)
		if (owner->cookie == cookie)
			return owner;
	return NULL;
}

/* The cookie of any socket, even a request or a TIME_WAIT. A socket without one gets one. */
static inline u64 sniffer_owner_cookie(struct sock *sk)
{
	u64 cookie = atomic64_read(&sk->sk_cookie);

	return likely(cookie) ? cookie : sniffer_owner_new_cookie(sk);
}

/* A socket's inode. The caller is under RCU, because inodes are freed by RCU. */
static inline u64 sniffer_owner_inode(const struct sock *sk)
{
	struct socket *sock = READ_ONCE(sk->sk_socket);

	return sock ? SOCK_INODE(sock)->i_ino : 0;
}

/* The file of @owner's socket while it has one. Under RCU or under the lock. */
static inline struct file *sniffer_owner_file(const struct sniffer_owner *owner)
{
	const struct socket *sock = READ_ONCE(owner->sock);

	/* a socket whose release is not seen may be freed: see sniffer_probes_exit() */
	return sock && sniffer_probes_tell_release() ? READ_ONCE(sock->file) : NULL;
}

/*
 * The socket of a file if it belongs into the table, else NULL. Of other files nothing
 * but the inode is read.
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

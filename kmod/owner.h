/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_OWNER_H
#define SNIFFER_OWNER_H

#include <linux/fs.h>
#include <net/sock.h>

#include "process.h"
#include "shared_proto.h"

/**
 * struct sniffer_hold - one process's hold on a socket
 * @next: in the owner's list, latest comer first
 * @proc: with a reference
 * @fds: descriptors known to refer to the socket
 */
struct sniffer_hold {
	struct sniffer_hold *next;
	struct sniffer_proc *proc;
	u32 fds;
};

/**
 * struct sniffer_owner - what is known of one socket
 * @by_cookie: in the cookie index
 * @by_inode: in the inode index while @inode is not 0
 * @cookie: socket cookie
 * @user: last process that used it and had it, with a reference; RCU
 * @inode: socket inode, 0 before accept()
 * @via: cookie of the socket whose owner counts instead: the listener while
 *	nobody has accepted this one, the parent of an MPTCP subflow; else 0
 * @tid: thread of last use
 * @creator: tgid that made or accepted it
 * @creator_start: its start_boottime
 * @netns: inode of the socket's network namespace
 * @flags: enum sniffer_flag as far as they belong to the socket
 * @nholders: length of @holds, readable without lock
 * @via_how: SNIFFER_HOW_LISTENER or SNIFFER_HOW_INODE, says which @via is
 * @proto: IPPROTO_TCP or IPPROTO_UDP
 * @family: AF_INET or AF_INET6
 * @port: local port when last used
 * @addr: local address when last used
 * @dead: jiffies | 1 when the socket was freed, or when @via was set; else 0
 * @waits: its end may have left a TIME_WAIT, which sends on for a while
 * @seen: jiffies of last use, exact only while probes do not fire, or of the
 *	last hold's end
 * @holds: guarded by the bucket lock of @cookie
 * @rcu: readers hold rcu_read_lock()
 */
struct sniffer_owner {
	struct hlist_node by_cookie;
	u64 cookie;
	struct sniffer_proc __rcu *user;
	u64 inode;
	u64 via;
	u32 tid;
	u16 flags;
	u16 nholders;
	u8 via_how;
	bool waits;
	/* colder */
	struct hlist_node by_inode;
	u32 creator;
	u32 netns;
	u64 creator_start;
	unsigned long dead;
	unsigned long seen;
	struct sniffer_hold *holds;
	struct rcu_head rcu;
	u16 port;
	u8 proto;
	u8 family;
	u8 addr[16];
};

bool sniffer_owner_wants(const struct sock *sk);
u64 sniffer_owner_cookie(struct sock *sk);
struct sniffer_owner *sniffer_owner_find(u64 cookie);
struct sniffer_owner *sniffer_owner_find_inode(u64 inode);
bool sniffer_owner_use(struct sock *sk, bool called);
void sniffer_owner_create(struct sock *sk, u64 inode);
void sniffer_owner_receive(struct sock *sk);
void sniffer_owner_refer(struct sock *sk, u64 via, u8 how);
void sniffer_owner_fork(struct task_struct *child);
void sniffer_owner_exec(struct task_struct *task);
void sniffer_owner_leave(struct task_struct *task);
void sniffer_owner_close(struct file *file);
void sniffer_owner_close_state(struct sock *sk, int oldstate, int newstate);
void sniffer_owner_free(struct sock *sk);
void sniffer_owner_seed(void);
struct sniffer_owner *sniffer_owner_next(unsigned int *bucket, unsigned int *index);
unsigned int sniffer_owner_holders(struct sniffer_owner *owner, struct sniffer_holder *out,
				   unsigned int max);
unsigned int sniffer_owner_count(void);
unsigned int sniffer_owner_max(void);
u64 sniffer_owner_full(void);
int sniffer_owner_init(void);
void sniffer_owner_exit(void);

/* Read a socket's inode; the caller is under RCU, under which inodes are freed. */
static inline u64 sniffer_owner_inode(const struct sock *sk)
{
	struct socket *sock = READ_ONCE(sk->sk_socket);

	return sock ? SOCK_INODE(sock)->i_ino : 0;
}

#endif /* SNIFFER_OWNER_H */

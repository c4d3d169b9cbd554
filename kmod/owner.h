/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_OWNER_H
#define SNIFFER_OWNER_H

#include "process.h"
#include "table.h"

/**
 * struct sniffer_gain - how a process came to have a socket
 * @proc: the process; the caller has a reference
 * @tid: its thread; 0: none was seen to use the socket
 * @inode: the socket's, 0 when it has none yet
 * @sock: the socket; NULL if unknown, or if its address may not be kept
 * @fd: a descriptor of it, -1 when not known
 * @flags: enum sniffer_flag that follow from how it was got
 * @ring: it has the socket through an io_uring, without a descriptor
 * @many: another process has the socket too
 * @guess: the last user is not certain
 */
struct sniffer_gain {
	struct sniffer_proc *proc;
	u32 tid;
	u64 inode;
	struct socket *sock;
	int fd;
	u16 flags;
	bool ring;
	bool many;
	bool guess;
};

void sniffer_owner_gain(struct sock *sk, const struct sniffer_gain *gain);
bool sniffer_owner_inherit(u64 cookie, const struct sniffer_proc *from, const struct file *file,
			   struct sniffer_proc *heir, int fd, bool past);
void sniffer_owner_serve(struct sock *sk, struct socket *sock);
void sniffer_owner_take(struct sniffer_owner *owner);
void sniffer_owner_refer(struct sock *sk, u64 via, u8 how);
void sniffer_owner_release(struct sock *sk);
void sniffer_owner_free(struct sock *sk);
void sniffer_owner_close_state(struct sock *sk, int oldstate, int newstate);
void sniffer_owner_remove(struct sniffer_owner *owner);
u64 sniffer_owner_tick(void);
u64 sniffer_owner_clock(void);

/* As far as is known, does @owner's user @user still have it? */
static inline bool sniffer_owner_held(const struct sniffer_owner *owner,
				      const struct sniffer_proc *user)
{
	return READ_ONCE(owner->held) && !READ_ONCE(user->exit_jiffies);
}

/**
 * sniffer_owner_shared - may a process other than its user have a socket?
 * @owner: the entry, under RCU
 * @user: its user
 *
 * Never false if one has. A descriptor in flight to another process counts as another
 * process. So does a thread that waits in a call.
 */
static inline bool sniffer_owner_shared(const struct sniffer_owner *owner,
					const struct sniffer_proc *user)
{
	struct file *file;

	if (!READ_ONCE(owner->many) && (s64)(READ_ONCE(user->forked) - owner->since) <= 0)
		return false;
	file = sniffer_owner_file(owner);
	return file && file_count(file) > 1;
}

#endif /* SNIFFER_OWNER_H */

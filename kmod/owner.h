/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_OWNER_H
#define SNIFFER_OWNER_H

#include "process.h"
#include "table.h"

/**
 * struct sniffer_gain - somebody has a socket now
 * @proc: who; the caller has a reference
 * @tid: thread, 0: none was seen to use it
 * @inode: the socket's, 0 when it has none yet
 * @sock: the socket, NULL when not known or not to be remembered
 * @fd: a descriptor of it, -1 when not known
 * @flags: enum sniffer_flag that follow from how it was got
 * @ring: without a descriptor, by an io_uring
 * @many: so has somebody else
 * @guess: who used it last is not known for certain
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

/* Does @user, who is @owner's, still have it, as far as is known? */
static inline bool sniffer_owner_held(const struct sniffer_owner *owner,
				      const struct sniffer_proc *user)
{
	return READ_ONCE(owner->held) && !READ_ONCE(user->exit_jiffies);
}

/**
 * sniffer_owner_shared - may another process than its user have a socket?
 * @owner: the entry, under RCU
 * @user: its user
 *
 * Never false when one does. A descriptor on its way to another process, and a
 * thread that waits in a call, count as one.
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

/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_USE_H
#define SNIFFER_USE_H

#include <linux/fdtable.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <linux/preempt.h>
#include <linux/sched.h>
#include <net/sock.h>

#include "compat.h"

struct sniffer_owner;

/* The entry of a used socket, or NULL, and its stripe's version from before it was read. */
struct sniffer_found {
	struct sniffer_owner *owner;
	unsigned int version;
};

bool sniffer_use(struct sock *sk, bool called, struct sniffer_found *found);
void sniffer_use_create(struct sock *sk, struct socket *sock);
void sniffer_use_receive(struct sock *sk, struct file *file);
void sniffer_use_fork(struct task_struct *child);
void sniffer_use_rings_end(void);
void sniffer_use_end(void);
void sniffer_use_thread_end(void);
void sniffer_use_close_file(struct file *file, int fd);
void sniffer_use_close(unsigned int fd);
void sniffer_use_close_range(unsigned int fd, unsigned int last);

/*
 * Does a descriptor of current refer to no io_uring, and to no socket that somebody
 * else may have? What most who close() close; see sniffer_use_close_file().
 * Preemption off is RCU enough, and costs less.
 */
static __always_inline bool sniffer_use_is_plain(unsigned int fd)
{
	struct files_struct *files = current->files;
	const struct fdtable *fdt;
	struct file *file;
	bool plain = true;

	if (unlikely(!files || sniffer_has_uring(current)))
		return !files;
	preempt_disable_notrace();
	fdt = rcu_dereference_raw(files->fdt);
	file = fd < fdt->max_fds ? rcu_dereference_raw(fdt->fd[fd]) : NULL;
	if (file)
		plain = file_inode(file)->i_sb->s_magic != SOCKFS_MAGIC || file_count(file) < 2;
	preempt_enable_notrace();
	return plain;
}

#endif /* SNIFFER_USE_H */

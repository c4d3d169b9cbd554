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

bool sniffer_use(struct sock *sk, bool called, struct sniffer_owner **found);
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
 * Is current's descriptor neither a socket nor an io_uring? Most calls of close() are
 * for such a file. Preemption off is enough for RCU, and costs less.
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
		plain = file_inode(file)->i_sb->s_magic != SOCKFS_MAGIC;
	preempt_enable_notrace();
	return plain;
}

#endif /* SNIFFER_USE_H */

/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_USE_H
#define SNIFFER_USE_H

#include <linux/fs.h>
#include <linux/sched.h>
#include <net/sock.h>

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

#endif /* SNIFFER_USE_H */

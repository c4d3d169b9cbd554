/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_DESCRIPTORS_H
#define SNIFFER_DESCRIPTORS_H

#include <linux/fs.h>
#include <linux/sched.h>

#define SNIFFER_DESCRIPTORS_CHUNK	1024	/* descriptors that are looked at under one lock */

struct task_struct *sniffer_descriptors_next_process(struct task_struct *last);
struct task_struct *sniffer_descriptors_next_table(struct task_struct *process,
						   struct task_struct *last);
u32 sniffer_descriptors_count(struct task_struct *process, const struct file *file, int *fd,
			      bool walk, u32 enough);
struct task_struct *sniffer_descriptors_leader(u32 tgid, u64 start_ns);
struct task_struct *sniffer_descriptors_youngest(const struct file *file, int *fd);

#endif /* SNIFFER_DESCRIPTORS_H */

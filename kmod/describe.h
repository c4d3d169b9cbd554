/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_DESCRIBE_H
#define SNIFFER_DESCRIBE_H

#include <linux/types.h>

#include "shared_proto.h"

struct mm_struct;
struct task_struct;

void sniffer_describe_exe(struct mm_struct *mm, char *exe);
u64 sniffer_describe_cgroup(struct task_struct *task, char *path);
void sniffer_describe_start(struct task_struct *task, struct sniffer_start *out);
int sniffer_describe_init(void);
void sniffer_describe_exit(void);

#endif /* SNIFFER_DESCRIBE_H */

// SPDX-License-Identifier: GPL-2.0-only
/*
 * What is told of a process: program, cgroup, parents and command line. A process that
 * lives a millisecond has gone before /proc can be read, and often its parents too.
 */
#include <linux/cgroup.h>
#include <linux/dcache.h>
#include <linux/file.h>
#include <linux/kernfs.h>
#include <linux/mm_types.h>
#include <linux/percpu.h>
#include <linux/preempt.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "comm.h"
#include "compat.h"
#include "describe.h"

/* Buffer for d_path(), used by its own CPU with interrupts off. */
static char __percpu *describe_path;

/**
 * sniffer_describe_exe - tell the path of a program
 * @mm: of the process; cannot go away
 * @exe: SNIFFER_EXE_LEN bytes; they stay if there is no program
 *
 * Any context.
 */
void sniffer_describe_exe(struct mm_struct *mm, char *exe)
{
	unsigned long flags;
	struct file *file;
	char *path, *buf;
	size_t len;

	rcu_read_lock();
	file = sniffer_exe_file(mm);
	rcu_read_unlock();
	if (!file)
		return;

	local_irq_save(flags);
	buf = this_cpu_ptr(describe_path);
	/* an exiting task has no root: use the file system's */
	path = current->fs ? d_path(&file->f_path, buf, PATH_MAX) :
			     dentry_path_raw(file->f_path.dentry, buf, PATH_MAX);
	/* user space gets the whole buffer, so clear the rest of an older path */
	memset(exe, 0, SNIFFER_EXE_LEN);
	if (!IS_ERR(path)) {
		len = strlen(path);
		if (len >= SNIFFER_EXE_LEN) {
			path += len - (SNIFFER_EXE_LEN - 1);
			len = SNIFFER_EXE_LEN - 1;
		}
		memcpy(exe, path, len);
	}
	local_irq_restore(flags);
	fput(file);
}

/**
 * sniffer_describe_cgroup - tell the path of a task's cgroup
 * @task: any task; under RCU
 * @path: SNIFFER_CGROUP_LEN bytes, filled completely
 *
 * A process that reads /proc/PID/cgroup later may find that a short-lived container has
 * gone. kernfs_path() takes a lock, so this is a walk of our own. Names on v2 never
 * change.
 *
 * Return: the cgroup's number, 0: none.
 */
u64 sniffer_describe_cgroup(struct task_struct *task, char *path)
{
#ifdef CONFIG_CGROUPS
	struct cgroup *cgroup = rcu_dereference(task->cgroups)->dfl_cgrp;
	char *start = path + SNIFFER_CGROUP_LEN - 1;
	u64 id = cgroup_id(cgroup);
	size_t len;

	memset(path, 0, SNIFFER_CGROUP_LEN);
	for (; cgroup_parent(cgroup); cgroup = cgroup_parent(cgroup)) {
		const char *name = (__force const char *)READ_ONCE(cgroup->kn->name);

		len = strlen(name);
		if (len + 1 > start - path) {
			memset(path, 0, SNIFFER_CGROUP_LEN);
			return id;
		}
		start -= len;
		memcpy(start, name, len);
		*--start = '/';
	}
	len = strlen(start);
	memmove(path, start, len);
	memset(path + len, 0, SNIFFER_CGROUP_LEN - len);
	return id;
#else
	memset(path, 0, SNIFFER_CGROUP_LEN);
	return 0;
#endif
}

/* Reads current's command line if no page of it has to be fetched: that may sleep. */
static void describe_args(const struct mm_struct *mm, struct sniffer_start *out)
{
	unsigned long begin = READ_ONCE(mm->arg_start), end = READ_ONCE(mm->arg_end);
	const void __user *args = (const void __user *)begin;
	unsigned long len, left;

	if (end <= begin)
		return;
	len = min(end - begin, (unsigned long)SNIFFER_ARGS_LEN);
	if (!access_ok(args, len))
		return;
	pagefault_disable();
	left = __copy_from_user_inatomic(out->args, args, len);
	pagefault_enable();
	if (left)
		memset(out->args, 0, sizeof(out->args));
	else
		out->args_len = min(end - begin, (unsigned long)U32_MAX);
}

/**
 * sniffer_describe_start - tell how a process began
 * @task: current, or another task: its command line is left to user space
 * @out: filled completely
 *
 * Any context.
 */
void sniffer_describe_start(struct task_struct *task, struct sniffer_start *out)
{
	unsigned int i;

	memset(out, 0, sizeof(*out));
	if (task == current && in_task() && task->mm && !(task->flags & PF_KTHREAD))
		describe_args(task->mm, out);
	rcu_read_lock();
	for (i = 0; i < SNIFFER_PARENTS; i++) {
		task = rcu_dereference(task->group_leader->real_parent);
		if (!task->tgid)
			break;
		out->parents[i].tgid = task->tgid;
		sniffer_comm_copy(out->parents[i].comm, task->group_leader->comm);
	}
	rcu_read_unlock();
}

int sniffer_describe_init(void)
{
	describe_path = __alloc_percpu(PATH_MAX, 1);
	return describe_path ? 0 : -ENOMEM;
}

/* Nothing runs any more that could describe a process. */
void sniffer_describe_exit(void)
{
	free_percpu(describe_path);
}

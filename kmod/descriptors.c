// SPDX-License-Identifier: GPL-2.0-only
/*
 * Reads descriptor tables of other processes, without taking references to the files.
 * All of it can be preempted: it holds a lock for SNIFFER_DESCRIPTORS_CHUNK descriptors
 * at a time.
 */
#include <linux/fdtable.h>
#include <linux/file.h>
#include <linux/pid_namespace.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>

#include "descriptors.h"

/*
 * Under RCU. A step from one task to the next: drops the reference to one, takes one to
 * the other.
 */
static struct task_struct *descriptors_step(struct task_struct *last, struct task_struct *next)
{
	if (next)
		get_task_struct(next);
	if (last)
		put_task_struct(last);
	return next;
}

/**
 * sniffer_descriptors_next_process - walk all processes of user space
 * @last: the process before, whose reference is consumed; NULL to begin
 *
 * Return: in the order of their start, with a reference; NULL at the end.
 */
struct task_struct *sniffer_descriptors_next_process(struct task_struct *last)
{
	struct task_struct *next = NULL, *process;

	rcu_read_lock();
	if (last && pid_alive(last) && thread_group_leader(last)) {
		next = next_task(last);
		if (next == &init_task)
			next = NULL;
	} else {
		/* @last has exited meanwhile: go on with the first younger process */
		for_each_process(process)
			if (!last || process->start_boottime > last->start_boottime) {
				next = process;
				break;
			}
	}
	next = descriptors_step(last, next);
	rcu_read_unlock();
	return next;
}

/*
 * Counts the descriptors of @file in the table of @task, up to @enough. Sets @fd to one
 * of them; its old value is tried first. Without @walk only that one is tried. Compares
 * addresses only.
 */
static u32 descriptors_count(struct task_struct *task, const struct file *file, int *fd, bool walk,
			     u32 enough)
{
	struct files_struct *files;
	unsigned int next = 0, end;
	struct fdtable *fdt;
	u32 count = 0;
	bool more;

	do {
		more = false;
		task_lock(task);
		files = task->files;
		if (files && !(task->flags & PF_EXITING)) {
			rcu_read_lock();
			fdt = files_fdtable(files);
			if (!next && enough == 1 && *fd >= 0 && *fd < fdt->max_fds &&
			    rcu_access_pointer(fdt->fd[*fd]) == file)
				count = 1;
			end = walk ? min(fdt->max_fds, next + SNIFFER_DESCRIPTORS_CHUNK) : 0;
			for (; next < end && count < enough; next++)
				if (rcu_access_pointer(fdt->fd[next]) == file) {
					*fd = next;
					count++;
				}
			more = walk && next < fdt->max_fds && count < enough;
			rcu_read_unlock();
		}
		task_unlock(task);
		cond_resched();
	} while (more);
	return count;
}

/**
 * sniffer_descriptors_next_table - walk the descriptor tables of a process
 * @process: the process; its first thread may have exited, others may have their own
 *	tables
 * @last: the thread before, whose reference is consumed; NULL to begin
 *
 * Return: a thread with another table than @last's, with a reference; NULL at the end.
 */
struct task_struct *sniffer_descriptors_next_table(struct task_struct *process,
						   struct task_struct *last)
{
	struct task_struct *thread, *next = NULL;
	bool passed = !last;

	rcu_read_lock();
	if (!last && READ_ONCE(process->files)) {
		next = process;
	} else {
		for_each_thread(process, thread) {
			if (thread == last) {
				passed = true;
				continue;
			}
			if (thread == process || !READ_ONCE(thread->files) || !passed)
				continue;
			if (READ_ONCE(thread->files) == READ_ONCE(process->files) ||
			    (last && READ_ONCE(thread->files) == READ_ONCE(last->files)))
				continue;
			next = thread;
			break;
		}
	}
	next = descriptors_step(last, next);
	rcu_read_unlock();
	return next;
}

/**
 * sniffer_descriptors_count - count a process's descriptors of a file, in all its
 * tables
 * @process: a thread of it
 * @file: compared by address only
 * @fd: tried first; set to one of them
 * @walk: look at all descriptors, not at @fd alone
 * @enough: where to stop counting
 */
u32 sniffer_descriptors_count(struct task_struct *process, const struct file *file, int *fd,
			      bool walk, u32 enough)
{
	struct task_struct *task = NULL;
	u32 count = 0;

	if (process->flags & PF_KTHREAD)
		return 0;
	while ((task = sniffer_descriptors_next_table(process, task))) {
		count += descriptors_count(task, file, fd, walk, enough - count);
		if (count >= enough) {
			put_task_struct(task);
			break;
		}
	}
	return count;
}

/**
 * sniffer_descriptors_leader - the first thread of a process
 * @tgid: its number in the initial pid namespace
 * @start_ns: when it began; 0: any process with that number
 *
 * Return: with a reference, or NULL when it has ended.
 */
struct task_struct *sniffer_descriptors_leader(u32 tgid, u64 start_ns)
{
	struct task_struct *task;
	struct pid *pid;

	rcu_read_lock();
	pid = find_pid_ns(tgid, &init_pid_ns);
	task = pid ? pid_task(pid, PIDTYPE_TGID) : NULL;
	if (task && start_ns && task->start_boottime != start_ns)
		task = NULL;
	if (task)
		get_task_struct(task);
	rcu_read_unlock();
	return task;
}

/**
 * sniffer_descriptors_youngest - find the youngest process that has a file
 * @file: compared by address only
 * @fd: tried first, in all processes; set to a descriptor of @file
 *
 * Return: with a reference, or NULL.
 */
struct task_struct *sniffer_descriptors_youngest(const struct file *file, int *fd)
{
	struct task_struct *process, *found = NULL;
	int at, walk;

	for (walk = 0; walk < 2 && !found; walk++) {
		process = NULL;
		while ((process = sniffer_descriptors_next_process(process))) {
			at = *fd;
			if (!sniffer_descriptors_count(process, file, &at, walk, 1))
				continue;
			if (found)
				put_task_struct(found);
			found = get_task_struct(process);
			if (walk)
				*fd = at;
		}
	}
	return found;
}

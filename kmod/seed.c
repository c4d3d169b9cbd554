// SPDX-License-Identifier: GPL-2.0-only
/*
 * What was there before us: the sockets of all running processes.
 */
#include <linux/fdtable.h>
#include <linux/module.h>
#include <linux/sched/task.h>

#include "alive.h"
#include "descriptors.h"
#include "owner.h"
#include "process.h"
#include "seed.h"

/* The sockets among @task's descriptors from *@next on; false at the end of the table. */
static bool seed_some(struct task_struct *task, unsigned int *next)
{
	struct sniffer_gain gain = { .flags = SNIFFER_F_SEEDED };
	struct files_struct *files;
	struct fdtable *fdt;
	unsigned int end;
	bool more = false;

	task_lock(task);
	files = task->files;
	if (!files || task->flags & PF_EXITING)
		goto out;
	/* keeps the files in the table, hence alive */
	spin_lock(&files->file_lock);
	fdt = files_fdtable(files);
	end = min(fdt->max_fds, *next + SNIFFER_DESCRIPTORS_CHUNK);
	for (; *next < end; (*next)++) {
		struct file *file = rcu_dereference_protected(fdt->fd[*next], true);
		struct sock *sk = file ? sniffer_owner_sock(file) : NULL;

		if (!sk)
			continue;
		if (!gain.proc)
			gain.proc = sniffer_process_get(task);
		if (!gain.proc) {
			sniffer_owner_count_full();
			goto unlock;
		}
		gain.file = sniffer_probes_tell_release() ? file : NULL;
		gain.inode = file_inode(file)->i_ino;
		gain.fd = *next;
		sniffer_owner_gain(sk, &gain);
	}
	more = end < fdt->max_fds;
unlock:
	spin_unlock(&files->file_lock);
out:
	task_unlock(task);
	sniffer_process_put(gain.proc);
	return more;
}

/**
 * sniffer_seed - enter the sockets of all running processes
 *
 * Process context, after the probes: what they missed is found here.
 */
void sniffer_seed(void)
{
	struct task_struct *process = NULL, *task;
	unsigned int next;

	/* the first thread may have exited, others may have tables of their own */
	while ((process = sniffer_descriptors_next_process(process))) {
		if (process->flags & PF_KTHREAD)
			continue;
		task = NULL;
		while ((task = sniffer_descriptors_next_table(process, task))) {
			next = 0;
			while (seed_some(task, &next))
				cond_resched();
		}
	}
}

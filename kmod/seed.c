// SPDX-License-Identifier: GPL-2.0-only
/* Enters sockets that are older than the module, from the descriptors of all processes. */
#include <linux/fdtable.h>
#include <linux/module.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/sched/task_stack.h>
#include <asm/syscall.h>

#include "alive.h"
#include "descriptors.h"
#include "owner.h"
#include "process.h"
#include "seed.h"

#define SEED_THREADS	1024	/* descriptors that are looked at under one lock */

/* Collects the sockets among @task's descriptors, from *@next on. False at the end of the table. */
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
	/* keeps the files of the table alive */
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
		gain.sock = sniffer_probes_tell_release() ? SOCKET_I(file_inode(file)) : NULL;
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
 * Process context. Runs after the probes, so that a socket that they missed is found
 * here.
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

/* If @task is in a system call on a socket whose user is in doubt, its process becomes the user. */
static void seed_call(struct task_struct *task)
{
	struct sniffer_gain gain = { .tid = task->pid, .fd = -1, .guess = true };
	struct pt_regs *regs = task_pt_regs(task);
	struct sniffer_owner *owner;
	unsigned long args[6];
	struct fdtable *fdt;
	struct file *file;
	struct sock *sk;

	task_lock(task);
	/*
	 * a task with descriptors has a stack; registers of a task in no call may hold
	 * any number
	 */
	if (!task->files || task->flags & (PF_EXITING | PF_KTHREAD) ||
	    syscall_get_nr(task, regs) < 0)
		goto out;
	syscall_get_arguments(task, regs, args);
	/* keeps the files of the table alive */
	spin_lock(&task->files->file_lock);
	fdt = files_fdtable(task->files);
	file = args[0] < fdt->max_fds ? rcu_dereference_protected(fdt->fd[args[0]], true) : NULL;
	sk = file ? sniffer_owner_sock(file) : NULL;
	owner = sk ? sniffer_owner_find(atomic64_read(&sk->sk_cookie)) : NULL;
	if (owner && READ_ONCE(owner->guess))
		gain.proc = sniffer_process_get(task);
	if (gain.proc) {
		gain.sock = sniffer_probes_tell_release() ? SOCKET_I(file_inode(file)) : NULL;
		gain.inode = file_inode(file)->i_ino;
		gain.fd = args[0];
		sniffer_owner_gain(sk, &gain);
	}
	spin_unlock(&task->files->file_lock);
out:
	task_unlock(task);
	sniffer_process_put(gain.proc);
}

/**
 * sniffer_seed_calls - settle doubtful sockets that a process is in a system call on
 *
 * Process context.
 */
void sniffer_seed_calls(void)
{
	struct task_struct *process = NULL, *thread;
	unsigned int threads;

	while ((process = sniffer_descriptors_next_process(process))) {
		threads = 0;
		rcu_read_lock();
		for_each_thread(process, thread) {
			if (++threads > SEED_THREADS)
				break;
			seed_call(thread);
		}
		rcu_read_unlock();
		cond_resched();
	}
}

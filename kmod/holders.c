// SPDX-License-Identifier: GPL-2.0-only
/*
 * Finds out who has a socket, from descriptor tables. This is done when a socket's last
 * user closes it. The process that closed it does the work on its way back to user space.
 * If it exits, it does so when its descriptors are gone, before its parent is told.
 */
#include <linux/module.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/task_work.h>
#include <linux/wait.h>

#include "compat.h"
#include "descriptors.h"
#include "holders.h"
#include "owner.h"
#include "process.h"

/**
 * struct holders_work - a search to do once its task has closed its descriptors
 * @work: queued at that task
 * @cookie: the socket; 0: see @proc
 * @proc: every socket whose last user is this process, with a reference; NULL: every
 *	socket whose last user shares the task's descriptor table
 */
struct holders_work {
	struct callback_head work;
	u64 cookie;
	struct sniffer_proc *proc;
};

static atomic_t holders_pending;
static DECLARE_WAIT_QUEUE_HEAD(holders_idle);

static bool holders_has(u32 tgid, u64 start_ns, const struct file *file, int *fd)
{
	struct task_struct *leader = sniffer_descriptors_leader(tgid, start_ns);
	bool has;

	if (!leader)
		return false;
	has = sniffer_descriptors_count(leader, file, fd, false, 1) ||
	      sniffer_descriptors_count(leader, file, fd, true, 1);
	put_task_struct(leader);
	return has;
}

/*
 * The entry for the process of @leader. NULL if none of its threads has descriptors.
 */
static struct sniffer_proc *holders_proc(struct task_struct *leader)
{
	struct task_struct *task = sniffer_descriptors_next_table(leader, NULL);
	struct sniffer_proc *proc = NULL;

	if (!task)
		return NULL;
	task_lock(task);	/* sniffer_process_get() wants the lock */
	if (task->files)
		proc = sniffer_process_get(task);
	task_unlock(task);
	put_task_struct(task);
	return proc;
}

/* What a search starts from; read together, under the lock. */
struct holders_case {
	u64 cookie;
	struct file *file;
	struct sniffer_proc *user;
	struct sniffer_proc *past[SNIFFER_OWNER_PAST];
	int fd;
	bool many;
	bool ring;
};

static bool holders_read(struct holders_case *c, u64 cookie)
{
	raw_spinlock_t *lock = sniffer_owner_lock(cookie);
	struct sniffer_owner *owner;
	unsigned long flags;
	unsigned int i;

	memset(c, 0, sizeof(*c));
	c->cookie = cookie;
	raw_spin_lock_irqsave(lock, flags);
	owner = sniffer_owner_find(cookie);
	if (owner && owner->held)
		c->user = rcu_dereference_protected(owner->user, true);
	if (c->user) {
		refcount_inc(&c->user->refs);
		for (i = 0; i < SNIFFER_OWNER_PAST; i++) {
			c->past[i] = owner->past[i];
			if (c->past[i])
				refcount_inc(&c->past[i]->refs);
		}
		c->file = sniffer_owner_file(owner);
		c->fd = owner->fd;
		c->ring = owner->ring || READ_ONCE(c->user->ring_files);
		c->many = owner->many || (s64)(READ_ONCE(c->user->forked) - owner->since) > 0;
	}
	raw_spin_unlock_irqrestore(lock, flags);
	return c->user;
}

static struct sniffer_proc *holders_heir(struct holders_case *c, struct sniffer_proc *guess,
					 bool *past)
{
	struct task_struct *leader = NULL;
	struct sniffer_proc *heir;
	unsigned int i;

	for (i = 0; i < SNIFFER_OWNER_PAST && c->past[i]; i++)
		if (!READ_ONCE(c->past[i]->exit_jiffies) &&
		    holders_has(c->past[i]->tgid, c->past[i]->start_ns, c->file, &c->fd)) {
			*past = true;
			refcount_inc(&c->past[i]->refs);
			return c->past[i];
		}
	*past = false;
	/* no process can have it: the file is in flight, in a ring, or the kernel's */
	if (!c->many)
		return NULL;
	if (guess && !READ_ONCE(guess->exit_jiffies) &&
	    holders_has(guess->tgid, guess->start_ns, c->file, &c->fd)) {
		refcount_inc(&guess->refs);
		return guess;
	}
	if (c->user->child && holders_has(c->user->child, 0, c->file, &c->fd))
		leader = sniffer_descriptors_leader(c->user->child, 0);
	if (!leader)
		leader = sniffer_descriptors_youngest(c->file, &c->fd);
	if (!leader)
		return NULL;
	heir = holders_proc(leader);
	put_task_struct(leader);
	return heir;
}

/* Has @task a descriptor of an io_uring? */
static bool holders_has_ring(struct task_struct *task)
{
	struct files_struct *files;
	unsigned int next = 0, end;
	bool found = false, more;
	struct fdtable *fdt;

	do {
		more = false;
		task_lock(task);
		files = task->files;
		if (files && !(task->flags & PF_EXITING)) {
			/* keeps the files of the table alive */
			spin_lock(&files->file_lock);
			fdt = files_fdtable(files);
			end = min(fdt->max_fds, next + SNIFFER_DESCRIPTORS_CHUNK);
			for (; next < end && !found; next++) {
				struct file *file = rcu_dereference_protected(fdt->fd[next], true);

				found = file && sniffer_is_uring(file);
			}
			more = next < fdt->max_fds && !found;
			spin_unlock(&files->file_lock);
		}
		task_unlock(task);
		cond_resched();
	} while (more);
	return found;
}

/* The reference count of @file, if it is still the socket's file. */
static long holders_references(u64 cookie, struct file *file)
{
	struct sniffer_owner *owner;
	long count = 0;

	rcu_read_lock();
	owner = sniffer_owner_find(cookie);
	if (owner && sniffer_owner_file(owner) == file)
		count = file_count(file);
	rcu_read_unlock();
	return count;
}

/*
 * The user has no descriptor of the socket, but may have it through an io_uring. If he
 * has a ring, references without a descriptor are taken for the ring's.
 */
static bool holders_in_ring(const struct holders_case *c)
{
	struct task_struct *leader = sniffer_descriptors_leader(c->user->tgid, c->user->start_ns);
	struct task_struct *process = NULL, *task = NULL;
	bool rings = READ_ONCE(c->user->ring_numbers);
	long count = 0;
	int fd = -1;

	while (leader && !rings && (task = sniffer_descriptors_next_table(leader, task)))
		rings = holders_has_ring(task);
	if (task)
		put_task_struct(task);
	if (leader)
		put_task_struct(leader);
	if (!rings || !c->many)
		return rings;
	while ((process = sniffer_descriptors_next_process(process)))
		count += sniffer_descriptors_count(process, c->file, &fd, true, U32_MAX);
	return holders_references(c->cookie, c->file) > count;
}

/*
 * Settles one socket. @guess is the process found for the socket before, with a
 * reference; it is replaced.
 */
static void holders_settle(u64 cookie, struct sniffer_proc **guess)
{
	struct sniffer_proc *heir = NULL;
	struct holders_case c;
	bool past = false;
	unsigned int i;

	if (!holders_read(&c, cookie))
		return;
	if (c.file && !READ_ONCE(c.user->exit_jiffies) &&
	    (holders_has(c.user->tgid, c.user->start_ns, c.file, &c.fd) ||
	     (c.ring && holders_in_ring(&c))))
		goto put;
	if (c.file)
		heir = holders_heir(&c, *guess, &past);
	sniffer_owner_inherit(cookie, c.user, c.file, heir, c.fd, past);
	if (heir && !past) {
		sniffer_process_put(*guess);
		*guess = heir;
		heir = NULL;
	}
	sniffer_process_put(heir);
put:
	for (i = 0; i < SNIFFER_OWNER_PAST; i++)
		sniffer_process_put(c.past[i]);
	sniffer_process_put(c.user);
}

/**
 * sniffer_holders_settle - find the new owner of a socket
 * @cookie: the socket
 *
 * Process context; may take long.
 */
void sniffer_holders_settle(u64 cookie)
{
	struct sniffer_proc *guess = NULL;

	holders_settle(cookie, &guess);
	sniffer_process_put(guess);
}

/* Takes the first socket of @proc's list and moves it to the end. Returns its cookie, 0: none. */
static u64 holders_rotate(struct sniffer_proc *proc)
{
	struct sniffer_owner *owner;
	unsigned long flags;
	u64 cookie = 0;

	raw_spin_lock_irqsave(&proc->lock, flags);
	owner = list_first_entry_or_null(&proc->uses, struct sniffer_owner, by_user);
	if (owner) {
		cookie = owner->cookie;
		list_move_tail(&owner->by_user, &proc->uses);
	}
	raw_spin_unlock_irqrestore(&proc->lock, flags);
	return cookie;
}

/**
 * sniffer_holders_settle_process - find new owners for the sockets of a process
 * @proc: it has ended, or has closed some of it; the caller has a reference
 *
 * Process context; may take long.
 */
void sniffer_holders_settle_process(struct sniffer_proc *proc)
{
	unsigned int left = READ_ONCE(proc->nuses);
	struct sniffer_proc *guess = NULL;
	u64 cookie;

	while (left-- && (cookie = holders_rotate(proc))) {
		holders_settle(cookie, &guess);
		cond_resched();
	}
	sniffer_process_put(guess);
}

/* The same for every process that shares current's descriptor table. */
static void holders_settle_table(void)
{
	struct task_struct *process = NULL;
	struct sniffer_proc *proc;

	while (current->files && (process = sniffer_descriptors_next_process(process))) {
		if (READ_ONCE(process->files) != current->files)
			continue;
		rcu_read_lock();
		proc = sniffer_process_find(process);
		if (proc && !refcount_inc_not_zero(&proc->refs))
			proc = NULL;
		rcu_read_unlock();
		if (proc)
			sniffer_holders_settle_process(proc);
		sniffer_process_put(proc);
	}
}

static void holders_do(struct callback_head *head)
{
	struct holders_work *work = container_of(head, struct holders_work, work);

	if (work->proc) {
		sniffer_holders_settle_process(work->proc);
		sniffer_process_put(work->proc);
	} else if (work->cookie) {
		sniffer_holders_settle(work->cookie);
	} else {
		holders_settle_table();
	}
	kfree(work);
	if (atomic_dec_and_test(&holders_pending))
		wake_up(&holders_idle);
}

/**
 * sniffer_holders_settle_later - do the same when current's system call, or current
 * itself, ends
 * @cookie: one socket, or 0 for all of:
 * @proc: a process, whose reference is consumed; NULL: all that share current's table
 *
 * Any context of a task. If there is no memory, the collector does it later.
 */
void sniffer_holders_settle_later(u64 cookie, struct sniffer_proc *proc)
{
	struct holders_work *work = kmalloc(sizeof(*work), GFP_ATOMIC | __GFP_NOWARN);

	if (!work)
		goto put;
	work->cookie = cookie;
	work->proc = proc;
	init_task_work(&work->work, holders_do);
	atomic_inc(&holders_pending);
	if (!task_work_add(current, &work->work, TWA_RESUME))
		return;
	atomic_dec(&holders_pending);
	kfree(work);
put:
	sniffer_process_put(proc);
}

/**
 * sniffer_holders_list - list the processes that have a socket
 * @cookie: the socket
 * @out: room for @max
 * @max: entries at most
 *
 * Process context. Searches all processes, if another one than the user may have the
 * socket.
 *
 * Return: number of holders, which may be more than @max.
 */
unsigned int sniffer_holders_list(u64 cookie, struct sniffer_holder *out, unsigned int max)
{
	struct task_struct *process = NULL;
	struct holders_case c;
	unsigned int count = 0, i;
	u32 fds;
	int fd = -1;

	if (!holders_read(&c, cookie))
		return 0;
	for (i = 0; i < SNIFFER_OWNER_PAST; i++)
		sniffer_process_put(c.past[i]);
	if (c.file && c.many) {
		while ((process = sniffer_descriptors_next_process(process))) {
			fds = sniffer_descriptors_count(process, c.file, &fd, true, U32_MAX);
			if (fds && count < max) {
				out[count].start_ns = process->start_boottime;
				out[count].tgid = process->tgid;
				out[count].fds = fds;
			}
			count += !!fds;
		}
	}
	/* the user, if nobody else may have it or he has no descriptor of it */
	if (!count && !READ_ONCE(c.user->exit_jiffies)) {
		if (max) {
			out[0].start_ns = c.user->start_ns;
			out[0].tgid = c.user->tgid;
			out[0].fds = 1;
		}
		count = 1;
	}
	sniffer_process_put(c.user);
	return count;
}

/* The probes are gone, so no new work is queued. Waits for what is queued. */
void sniffer_holders_exit(void)
{
	wait_event(holders_idle, !atomic_read(&holders_pending));
	/* wait until the last task work has left this module's text */
	sniffer_synchronize_tasks();
}

// SPDX-License-Identifier: GPL-2.0-only
/*
 * Who has a socket, by the descriptor tables themselves. Asked when a socket's
 * last user lets go of it, in the context of who let go: on its way back to
 * user space or, at its end, after its descriptors are gone and before its
 * parent is told. All of it can be preempted; it holds locks for so many
 * descriptors at a time.
 */
#include <linux/fdtable.h>
#include <linux/file.h>
#include <linux/module.h>
#include <linux/pid_namespace.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/task_work.h>
#include <linux/wait.h>

#include "compat.h"
#include "owner.h"
#include "probes.h"

#define HOLDERS_CHUNK	1024	/* descriptors that are looked at in one go */

/**
 * struct holders_work - to be settled when its task has let go
 * @work: of that task
 * @cookie: this socket, or 0:
 * @proc: all that this process was the last user of, with a reference, or NULL:
 *	that those were who have the same descriptor table
 * @rings: an io_uring of it has gone
 */
struct holders_work {
	struct callback_head work;
	u64 cookie;
	struct sniffer_proc *proc;
	bool rings;
};

static atomic_t holders_pending;
static DECLARE_WAIT_QUEUE_HEAD(holders_idle);

/* A step through all processes of user space, in the order of their start; NULL at first. */
static struct task_struct *holders_next_process(struct task_struct *last)
{
	struct task_struct *next = NULL, *process;

	rcu_read_lock();
	if (last && pid_alive(last) && thread_group_leader(last)) {
		next = next_task(last);
		if (next == &init_task)
			next = NULL;
	} else {
		/* it has gone meanwhile: go on with the first that is younger */
		for_each_process(process)
			if (!last || process->start_boottime > last->start_boottime) {
				next = process;
				break;
			}
	}
	if (next)
		get_task_struct(next);
	rcu_read_unlock();
	if (last)
		put_task_struct(last);
	return next;
}

/*
 * Descriptors of @file in the table of @task: how many, but no more than
 * @enough; one of them goes to @fd, whose old value is tried first. Without
 * @walk only that one is. Compares addresses only.
 */
static u32 holders_count_fds(struct task_struct *task, const struct file *file, int *fd, bool walk,
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
			end = walk ? min(fdt->max_fds, next + HOLDERS_CHUNK) : 0;
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

/* A reference to the next thread of @process with a table of its own; NULL at first. */
static struct task_struct *holders_next_table(struct task_struct *process, struct task_struct *last)
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
	if (next)
		get_task_struct(next);
	rcu_read_unlock();
	if (last)
		put_task_struct(last);
	return next;
}

/* The same as holders_count_fds(), over all tables of @process. */
static u32 holders_count(struct task_struct *process, const struct file *file, int *fd, bool walk,
			 u32 enough)
{
	struct task_struct *task = NULL;
	u32 count = 0;

	if (process->flags & PF_KTHREAD)
		return 0;
	while ((task = holders_next_table(process, task))) {
		count += holders_count_fds(task, file, fd, walk, enough - count);
		if (count >= enough) {
			put_task_struct(task);
			break;
		}
	}
	return count;
}

/* The leader of a process, with a reference, or NULL when it has ended. */
static struct task_struct *holders_leader(u32 tgid, u64 start_ns)
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

static bool holders_has(u32 tgid, u64 start_ns, const struct file *file, int *fd)
{
	struct task_struct *leader = holders_leader(tgid, start_ns);
	bool has;

	if (!leader)
		return false;
	has = holders_count(leader, file, fd, false, 1) || holders_count(leader, file, fd, true, 1);
	put_task_struct(leader);
	return has;
}

/* The youngest process that has @file, with a reference, or NULL: first by number, then anywhere. */
static struct task_struct *holders_youngest(const struct file *file, int *fd)
{
	struct task_struct *process, *found = NULL;
	int at, walk;

	for (walk = 0; walk < 2 && !found; walk++) {
		process = NULL;
		while ((process = holders_next_process(process))) {
			at = *fd;
			if (!holders_count(process, file, &at, walk, 1))
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

/* The table's entry of a process; a thread of it has a table, else it ends. */
static struct sniffer_proc *holders_proc(struct task_struct *leader)
{
	struct task_struct *task = holders_next_table(leader, NULL);
	struct sniffer_proc *proc = NULL;

	if (!task)
		return NULL;
	task_lock(task);	/* as sniffer_process_get() wants it */
	if (task->files)
		proc = sniffer_process_get(task);
	task_unlock(task);
	put_task_struct(task);
	return proc;
}

/* What settling starts from: read together. */
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
		c->file = owner->file;
		c->fd = owner->fd;
		c->ring = owner->ring;
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
	/* nobody else can have got it: it is on its way, in a ring, or the kernel's */
	if (!c->many)
		return NULL;
	if (guess && !READ_ONCE(guess->exit_jiffies) &&
	    holders_has(guess->tgid, guess->start_ns, c->file, &c->fd)) {
		refcount_inc(&guess->refs);
		return guess;
	}
	if (c->user->child && holders_has(c->user->child, 0, c->file, &c->fd))
		leader = holders_leader(c->user->child, 0);
	if (!leader)
		leader = holders_youngest(c->file, &c->fd);
	if (!leader)
		return NULL;
	heir = holders_proc(leader);
	put_task_struct(leader);
	return heir;
}

/* Is one of @task's descriptors an io_uring's? */
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
			/* keeps the files in the table, hence alive */
			spin_lock(&files->file_lock);
			fdt = files_fdtable(files);
			end = min(fdt->max_fds, next + HOLDERS_CHUNK);
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

/* How many refer to @file, if it still is the socket's. */
static long holders_references(u64 cookie, struct file *file)
{
	struct sniffer_owner *owner;
	long count = 0;

	rcu_read_lock();
	owner = sniffer_owner_find(cookie);
	if (owner && READ_ONCE(owner->file) == file)
		count = file_count(file);
	rcu_read_unlock();
	return count;
}

/*
 * The user had it by an io_uring, and one of his has lost files or is closed:
 * does another have it still? What no descriptor refers to is taken for a ring's.
 */
static bool holders_in_ring(const struct holders_case *c)
{
	struct task_struct *leader = holders_leader(c->user->tgid, c->user->start_ns);
	struct task_struct *process = NULL, *task = NULL;
	bool rings = false;
	long count = 0;
	int fd = -1;

	while (leader && !rings && (task = holders_next_table(leader, task)))
		rings = holders_has_ring(task);
	if (task)
		put_task_struct(task);
	if (leader)
		put_task_struct(leader);
	if (!rings || !c->many)
		return rings;
	while ((process = holders_next_process(process)))
		count += holders_count(process, c->file, &fd, true, U32_MAX);
	return holders_references(c->cookie, c->file) > count;
}

/* Settles one; @guess is who was found for the one before, with a reference, and is replaced. */
static void holders_settle(u64 cookie, bool rings, struct sniffer_proc **guess)
{
	struct sniffer_proc *heir = NULL;
	struct holders_case c;
	bool past = false;
	unsigned int i;

	if (!holders_read(&c, cookie))
		return;
	if (c.file && !READ_ONCE(c.user->exit_jiffies) &&
	    ((c.ring && !rings) || holders_has(c.user->tgid, c.user->start_ns, c.file, &c.fd) ||
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
 * sniffer_holders_settle - find out who has a socket
 * @cookie: the socket
 *
 * Process context; may take long.
 */
void sniffer_holders_settle(u64 cookie)
{
	struct sniffer_proc *guess = NULL;

	holders_settle(cookie, false, &guess);
	sniffer_process_put(guess);
}

/* The first socket of those that @proc is the user of, moved to the end; 0: none. */
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
 * sniffer_holders_settle_process - find out who has what a process was the last user of
 * @proc: it has ended, or has closed some of it; the caller has a reference
 * @rings: what it had by an io_uring alone it has no longer
 *
 * Process context; may take long.
 */
void sniffer_holders_settle_process(struct sniffer_proc *proc, bool rings)
{
	unsigned int left = READ_ONCE(proc->nuses);
	struct sniffer_proc *guess = NULL;
	u64 cookie;

	while (left-- && (cookie = holders_rotate(proc))) {
		holders_settle(cookie, rings, &guess);
		cond_resched();
	}
	sniffer_process_put(guess);
}

/* What those were the last users of who have the table of current. */
static void holders_settle_table(void)
{
	struct task_struct *process = NULL;
	struct sniffer_proc *proc;

	while (current->files && (process = holders_next_process(process))) {
		if (READ_ONCE(process->files) != current->files)
			continue;
		rcu_read_lock();
		proc = sniffer_process_find(process);
		if (proc && !refcount_inc_not_zero(&proc->refs))
			proc = NULL;
		rcu_read_unlock();
		if (proc)
			sniffer_holders_settle_process(proc, false);
		sniffer_process_put(proc);
	}
}

static void holders_do(struct callback_head *head)
{
	struct holders_work *work = container_of(head, struct holders_work, work);

	if (work->proc) {
		sniffer_holders_settle_process(work->proc, work->rings);
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
 * sniffer_holders_settle_later - the same when the current task's system call or life is over
 * @cookie: one socket, or 0 for all of:
 * @proc: a process, whose reference is taken over; NULL: of all with the table of current
 * @rings: an io_uring of it goes
 *
 * Any context of a task. What finds no memory is left to the collector.
 */
void sniffer_holders_settle_later(u64 cookie, struct sniffer_proc *proc, bool rings)
{
	struct holders_work *work = kmalloc(sizeof(*work), GFP_ATOMIC | __GFP_NOWARN);

	if (!work)
		goto put;
	work->cookie = cookie;
	work->proc = proc;
	work->rings = rings;
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
 * sniffer_holders_list - list who has a socket
 * @cookie: the socket
 * @out: room for @max
 * @max: entries at most
 *
 * Process context; looks at every process where another one may have it.
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
		while ((process = holders_next_process(process))) {
			fds = holders_count(process, c.file, &fd, true, U32_MAX);
			if (fds && count < max) {
				out[count].start_ns = process->start_boottime;
				out[count].tgid = process->tgid;
				out[count].fds = fds;
			}
			count += !!fds;
		}
	}
	/* one that has it without a descriptor, or alone */
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

/* The sockets among @task's descriptors from *@next on; false at the end of the table. */
static bool holders_seed_some(struct task_struct *task, unsigned int *next)
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
	end = min(fdt->max_fds, *next + HOLDERS_CHUNK);
	for (; *next < end; (*next)++) {
		struct file *file = rcu_dereference_protected(fdt->fd[*next], true);
		struct sock *sk = file ? sniffer_use_sock(file) : NULL;

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
 * sniffer_holders_seed - enter the sockets of all running processes
 *
 * Process context, after the probes: what they missed is found here.
 */
void sniffer_holders_seed(void)
{
	struct task_struct *process = NULL, *task;
	unsigned int next;

	/* the first thread may have exited, others may have tables of their own */
	while ((process = holders_next_process(process))) {
		if (process->flags & PF_KTHREAD)
			continue;
		task = NULL;
		while ((task = holders_next_table(process, task))) {
			next = 0;
			while (holders_seed_some(task, &next))
				cond_resched();
		}
	}
}

/* The probes are gone: nothing new is to be settled. Waits for what is. */
void sniffer_holders_exit(void)
{
	wait_event(holders_idle, !atomic_read(&holders_pending));
	/* until the last one has left this module's text */
	sniffer_synchronize_tasks();
}

// SPDX-License-Identifier: GPL-2.0-only
/*
 * The process table: every process that used a socket, by (tgid, start time). An entry
 * stays for a while after exit, so that late packets still have a name.
 */
#include <linux/cred.h>
#include <linux/hash.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/pid_namespace.h>
#include <linux/rculist.h>
#include <linux/slab.h>

#include "describe.h"
#include "events.h"
#include "process.h"

#define PROCESS_BITS	12
#define PROCESS_MAX	(1U << 22)	/* PID_MAX_LIMIT: Linux cannot have more */
#define PROCESS_KEEP	(130 * HZ)	/* as long as a socket is kept, see table.h */
#define PROCESS_KEEP_MIN (5 * HZ)	/* when the table is nearly full */
#define PROCESS_RING_LAG (2 * HZ)	/* an io_uring drops a file later than it says */

static unsigned int max_processes = 32768;
module_param(max_processes, uint, 0444);
MODULE_PARM_DESC(max_processes, "the most processes in the process table (default 32768)");

static struct hlist_head process_table[1 << PROCESS_BITS];
/*
 * Guards insertion into and removal from process_table. Probe handlers (any context,
 * interrupts possibly off) and the collector take it: irqsave. Innermost lock. Readers
 * use RCU.
 */
static DEFINE_RAW_SPINLOCK(process_lock);
static unsigned int process_used;	/* guarded by process_lock */
static unsigned int process_changes;	/* guarded by process_lock */

static struct hlist_head *process_bucket(u32 tgid)
{
	return &process_table[hash_32(tgid, PROCESS_BITS)];
}

/*
 * @task is current, or held by task_lock(). So its mm cannot go away.
 */
static void process_fill(struct sniffer_proc *proc, struct task_struct *task)
{
	struct task_struct *leader = task->group_leader;
	struct pid_namespace *ns;

	raw_spin_lock_init(&proc->lock);
	INIT_LIST_HEAD(&proc->uses);
	proc->tgid = task->tgid;
	proc->start_ns = leader->start_boottime;
	sniffer_comm_copy(proc->comm, leader->comm);
	/* first seen when it closes its sockets: its exit event has passed */
	if (!atomic_read(&task->signal->live))
		proc->exit_jiffies = jiffies | 1;

	rcu_read_lock();
	proc->uid = __kuid_val(__task_cred(task)->uid);
	proc->ppid = rcu_dereference(leader->real_parent)->tgid;
	proc->cgroup_id = sniffer_describe_cgroup(task, proc->cgroup);
	ns = task_active_pid_ns(task);
	if (ns) {
		proc->pidns = ns->ns.inum;
		proc->ns_tgid = task_tgid_nr_ns(task, ns);
	}
	rcu_read_unlock();
	if (task->mm && !(task->flags & PF_KTHREAD))
		sniffer_describe_exe(task->mm, proc->exe);
}

/**
 * sniffer_process_describe - fill in a process's message
 * @proc: the process, under RCU or with a reference
 * @event: enum sniffer_event
 * @out: filled but for @out->start
 */
void sniffer_process_describe(const struct sniffer_proc *proc, u32 event,
			      struct sniffer_process *out)
{
	out->time_ns = ktime_get_ns();
	out->start_ns = proc->start_ns;
	out->cgroup_id = proc->cgroup_id;
	out->tgid = proc->tgid;
	out->ppid = proc->ppid;
	out->uid = READ_ONCE(proc->uid);
	out->pidns = proc->pidns;
	out->ns_tgid = proc->ns_tgid;
	out->event = event;
	memcpy(out->comm, proc->comm, SNIFFER_COMM_LEN);
	memcpy(out->exe, proc->exe, SNIFFER_EXE_LEN);
	memcpy(out->cgroup, proc->cgroup, SNIFFER_CGROUP_LEN);
}

/* @task: the process's, when it is new or a new program; else NULL. */
static void process_tell(const struct sniffer_proc *proc, u32 what, struct task_struct *task)
{
	struct sniffer_process *event = sniffer_events_begin();

	if (!event)
		return;
	sniffer_process_describe(proc, what, event);
	if (task)
		sniffer_describe_start(task, &event->start);
	sniffer_events_end(event, task);
}

/**
 * sniffer_process_find - find the entry of a task's process
 * @task: any live task
 *
 * Return: the entry or NULL; valid in the caller's RCU section.
 */
struct sniffer_proc *sniffer_process_find(const struct task_struct *task)
{
	struct sniffer_proc *proc;

	hlist_for_each_entry_rcu(proc, process_bucket(task->tgid), node)
		if (sniffer_process_is(proc, task))
			return proc;
	return NULL;
}

/**
 * sniffer_process_get - find or make the entry of a task's process
 * @task: current, or held by task_lock()
 *
 * Return: the entry with a reference for the caller, or NULL when the table is
 * full or memory is short.
 */
struct sniffer_proc *sniffer_process_get(struct task_struct *task)
{
	struct sniffer_proc *proc, *fresh;
	unsigned long flags;

	rcu_read_lock();
	proc = sniffer_process_find(task);
	if (proc && !refcount_inc_not_zero(&proc->refs))
		proc = NULL;
	rcu_read_unlock();
	if (proc)
		return proc;

	if (READ_ONCE(process_used) >= max_processes)
		return NULL;
	fresh = kzalloc(sizeof(*fresh), GFP_ATOMIC | __GFP_NOWARN);
	if (!fresh)
		return NULL;
	process_fill(fresh, task);
	refcount_set(&fresh->refs, 2);

	raw_spin_lock_irqsave(&process_lock, flags);
	proc = sniffer_process_find(task);
	if (proc && refcount_inc_not_zero(&proc->refs)) {
		raw_spin_unlock_irqrestore(&process_lock, flags);
		kfree(fresh);
		return proc;
	}
	hlist_add_head_rcu(&fresh->node, process_bucket(fresh->tgid));
	process_used++;
	process_changes++;
	raw_spin_unlock_irqrestore(&process_lock, flags);

	process_tell(fresh, SNIFFER_EVENT_SEEN, task);
	return fresh;
}

/**
 * sniffer_process_put - drop a reference
 * @proc: may be NULL
 */
void sniffer_process_put(struct sniffer_proc *proc)
{
	if (proc && refcount_dec_and_test(&proc->refs))
		kfree_rcu(proc, rcu);
}

/**
 * sniffer_process_refresh - follow setuid() of the current process
 * @proc: entry of current
 */
void sniffer_process_refresh(struct sniffer_proc *proc)
{
	u32 uid = __kuid_val(current_uid());

	if (READ_ONCE(proc->uid) != uid)
		WRITE_ONCE(proc->uid, uid);
}

/**
 * sniffer_process_credentials - the current thread will get other credentials
 * @cred: the new credentials
 *
 * So a process that only receives has its new user at once. A change by another thread
 * than the first one is seen when it uses a socket.
 */
void sniffer_process_credentials(const struct cred *cred)
{
	struct sniffer_proc *proc;

	if (!thread_group_leader(current))
		return;
	rcu_read_lock();
	proc = sniffer_process_find(current);
	if (proc)
		WRITE_ONCE(proc->uid, __kuid_val(cred->uid));
	rcu_read_unlock();
}

/**
 * sniffer_process_exec - a process became another program
 * @task: current
 */
void sniffer_process_exec(struct task_struct *task)
{
	struct sniffer_proc *proc;

	rcu_read_lock();
	proc = sniffer_process_find(task);
	if (proc) {
		sniffer_comm_copy(proc->comm, task->group_leader->comm);
		WRITE_ONCE(proc->ring_numbers, 0);	/* a process's rings end with its program */
		if (task->mm)
			sniffer_describe_exe(task->mm, proc->exe);
		sniffer_process_refresh(proc);
		process_tell(proc, SNIFFER_EVENT_EXEC, task);
	}
	rcu_read_unlock();
}

/**
 * sniffer_process_exited - the last thread of a process is exiting
 * @task: that thread
 */
void sniffer_process_exited(struct task_struct *task)
{
	struct sniffer_proc *proc;

	rcu_read_lock();
	proc = sniffer_process_find(task);
	if (proc) {
		WRITE_ONCE(proc->exit_jiffies, jiffies | 1);
		process_tell(proc, SNIFFER_EVENT_EXIT, NULL);
	}
	rcu_read_unlock();
}

/**
 * sniffer_process_doubt - check the sockets of a process soon
 * @proc: one of its rings drops a file; under RCU or with a reference
 *
 * Many calls cause one check after some seconds.
 */
void sniffer_process_doubt(struct sniffer_proc *proc)
{
	if (READ_ONCE(proc->doubt))
		WRITE_ONCE(proc->again, true);
	else
		WRITE_ONCE(proc->doubt, (jiffies + PROCESS_RING_LAG) | 1);
}

/* Is the check due that sniffer_process_doubt() asked for? */
static bool process_is_due(struct sniffer_proc *proc)
{
	unsigned long doubt = READ_ONCE(proc->doubt);

	if (!doubt || !time_after(jiffies, doubt))
		return false;
	WRITE_ONCE(proc->doubt, 0);
	if (READ_ONCE(proc->again)) {
		WRITE_ONCE(proc->again, false);
		sniffer_process_doubt(proc);
	}
	return true;
}

/**
 * sniffer_process_rename - a leader changed its comm
 * @task: the thread that is renamed
 * @comm: its new name
 */
void sniffer_process_rename(struct task_struct *task, const char *comm)
{
	struct sniffer_proc *proc;

	if (!thread_group_leader(task))
		return;
	rcu_read_lock();
	proc = sniffer_process_find(task);
	if (proc && strncmp(proc->comm, comm, SNIFFER_COMM_LEN)) {
		sniffer_comm_copy(proc->comm, comm);
		process_tell(proc, SNIFFER_EVENT_RENAME, NULL);
	}
	rcu_read_unlock();
}

/**
 * sniffer_process_next - walk the table for a dump
 * @bucket: where the walk stands; 0 at first
 * @index: the same within the bucket
 *
 * Return: the next entry or NULL at the end; under RCU.
 */
struct sniffer_proc *sniffer_process_next(unsigned int *bucket, unsigned int *index)
{
	struct sniffer_proc *proc;
	unsigned int i;

	for (; *bucket < ARRAY_SIZE(process_table); (*bucket)++, *index = 0) {
		i = 0;
		hlist_for_each_entry_rcu(proc, &process_table[*bucket], node)
			if (i++ == *index) {
				(*index)++;
				return proc;
			}
	}
	return NULL;
}

/**
 * sniffer_process_orphan - find a process whose sockets need a check
 *
 * It has ended without a check, or one of its rings has dropped files.
 *
 * Return: with a reference for the caller, or NULL.
 */
struct sniffer_proc *sniffer_process_orphan(void)
{
	struct sniffer_proc *proc;
	unsigned int i;

	rcu_read_lock();
	for (i = 0; i < ARRAY_SIZE(process_table); i++)
		hlist_for_each_entry_rcu(proc, &process_table[i], node) {
			unsigned long gone = READ_ONCE(proc->exit_jiffies);

			if (!process_is_due(proc) && (!gone || !time_after(jiffies, gone + HZ)))
				continue;
			if (!list_empty(&proc->uses) && refcount_inc_not_zero(&proc->refs)) {
				rcu_read_unlock();
				return proc;
			}
		}
	rcu_read_unlock();
	return NULL;
}

/**
 * sniffer_process_generation - changes whenever a process comes or goes
 */
unsigned int sniffer_process_generation(void)
{
	return READ_ONCE(process_changes);
}

/**
 * sniffer_process_count - entries in the table now
 */
unsigned int sniffer_process_count(void)
{
	return READ_ONCE(process_used);
}

/**
 * sniffer_process_tight - is the process table nearly full?
 *
 * If so, processes that have exited, and their sockets, are kept for a shorter time.
 */
bool sniffer_process_tight(void)
{
	return READ_ONCE(process_used) > max_processes / 4 * 3;
}

/**
 * sniffer_process_collect - remove processes that exited long ago
 *
 * Process context, from the collector.
 */
void sniffer_process_collect(void)
{
	unsigned long keep = sniffer_process_tight() ? PROCESS_KEEP_MIN : PROCESS_KEEP;
	struct sniffer_proc *proc;
	struct hlist_node *next;
	unsigned long flags;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(process_table); i++) {
		if (hlist_empty(&process_table[i]))
			continue;
		raw_spin_lock_irqsave(&process_lock, flags);
		hlist_for_each_entry_safe(proc, next, &process_table[i], node) {
			unsigned long gone = READ_ONCE(proc->exit_jiffies);

			if (!gone || refcount_read(&proc->refs) > 1 ||
			    time_before(jiffies, gone + keep))
				continue;
			hlist_del_rcu(&proc->node);
			process_used--;
			process_changes++;
			sniffer_process_put(proc);
		}
		raw_spin_unlock_irqrestore(&process_lock, flags);
		cond_resched();
	}
}

int sniffer_process_init(void)
{
	if (max_processes < 1 || max_processes > PROCESS_MAX) {
		pr_err("sniffer: max_processes must be 1 to %u, not %u\n", PROCESS_MAX,
		       max_processes);
		return -EINVAL;
	}
	return sniffer_describe_init();
}

/* Nothing runs any more that could read the table. */
void sniffer_process_exit(void)
{
	struct sniffer_proc *proc;
	struct hlist_node *next;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(process_table); i++)
		hlist_for_each_entry_safe(proc, next, &process_table[i], node)
			sniffer_process_put(proc);
	rcu_barrier();
	sniffer_describe_exit();
}

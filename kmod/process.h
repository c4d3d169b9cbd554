/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_PROCESS_H
#define SNIFFER_PROCESS_H

#include <linux/list.h>
#include <linux/refcount.h>
#include <linux/sched.h>
#include <linux/spinlock.h>
#include <linux/types.h>

#include "comm.h"
#include "shared_proto.h"

/**
 * struct sniffer_proc - a process that used a socket
 * @node: in the process table, by tgid
 * @refs: the table's one, and one for each socket that names it
 * @tgid: in the initial pid namespace
 * @uid: real uid in the initial user namespace, which is what a kuid_t holds;
 *	follows setuid at next use
 * @start_ns: start_boottime of the leader; with @tgid it is the identity
 * @comm: of the leader; written whole, but a reader may see half a rename
 * @rcu: readers of the table and of owners hold rcu_read_lock()
 * @exit_jiffies: when it exited; 0 while it runs
 * @doubt: jiffies | 1 at which its sockets need a check; 0: no check. A ring drops a file
 *	later than it says
 * @again: one more check is needed, because a ring dropped another file meanwhile
 * @ring_files: it has put files into an io_uring, so it may have sockets without a
 *	descriptor
 * @ring_numbers: how many io_urings it can use without a descriptor
 * @forked: sniffer_owner_tick() of its last fork, 0: none
 * @child: tgid of the child of that fork
 * @lock: guards @uses and @nuses; inside a socket's lock, any context: irqsave, raw
 * @uses: sockets whose user it is and that it has
 * @nuses: how many
 * @cgroup_id: like those that follow, constant between exec and exit; for events and dumps
 * @ppid: its real parent's tgid
 * @pidns: inode of its pid namespace
 * @ns_tgid: its tgid in there
 * @exe: path of its program
 * @cgroup: path of its cgroup
 *
 * A packet needs only the first members: one cache line.
 */
struct sniffer_proc {
	struct hlist_node node;
	refcount_t refs;
	u32 tgid;
	u32 uid;
	u32 child;
	u64 start_ns;
	char comm[SNIFFER_COMM_LEN];
	unsigned long exit_jiffies;
	unsigned long doubt;
	bool again;
	bool ring_files;
	unsigned int ring_numbers;
	u64 forked;
	raw_spinlock_t lock;
	struct list_head uses;
	unsigned int nuses;
	struct rcu_head rcu;
	u64 cgroup_id;
	u32 ppid;
	u32 pidns;
	u32 ns_tgid;
	char exe[SNIFFER_EXE_LEN];
	char cgroup[SNIFFER_CGROUP_LEN];
};

/* True when @proc is the process of @task. */
static inline bool sniffer_process_is(const struct sniffer_proc *proc,
				      const struct task_struct *task)
{
	return proc->tgid == task->tgid && proc->start_ns == task->group_leader->start_boottime;
}

struct sniffer_proc *sniffer_process_find(const struct task_struct *task);
struct sniffer_proc *sniffer_process_get(struct task_struct *task);
void sniffer_process_put(struct sniffer_proc *proc);
void sniffer_process_refresh(struct sniffer_proc *proc);
void sniffer_process_credentials(const struct cred *cred);
void sniffer_process_exec(struct task_struct *task);
void sniffer_process_exited(struct task_struct *task);
void sniffer_process_doubt(struct sniffer_proc *proc);
void sniffer_process_rename(struct task_struct *task, const char *comm);
void sniffer_process_describe(const struct sniffer_proc *proc, u32 event,
			      struct sniffer_process *out);
struct sniffer_proc *sniffer_process_next(unsigned int *bucket, unsigned int *index);
struct sniffer_proc *sniffer_process_orphan(void);
unsigned int sniffer_process_generation(void);
unsigned int sniffer_process_count(void);
bool sniffer_process_tight(void);
void sniffer_process_collect(void);
int sniffer_process_init(void);
void sniffer_process_exit(void);

#endif /* SNIFFER_PROCESS_H */

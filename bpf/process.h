/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_PROCESS_H
#define HUNTER_PROCESS_H
/* The process table: every process that used a socket, by (tgid, start time). */
#include "events.h"

static __always_inline void key_of(struct task_struct *task, struct key *key)
{
	key->start = task->group_leader->start_boottime;
	key->tgid = task->tgid;
	key->unused = 0;
}

static __always_inline void key_at(struct task_struct *task, struct key *key)
{
	key->start = BPF_CORE_READ(task, group_leader, start_boottime);
	key->tgid = BPF_CORE_READ(task, tgid);
	key->unused = 0;
}

/* Enters the process of a task (an address), or follows its setuid(). */
__noinline int process_enter(u64 task_address, struct key *who)
{
	struct task_struct *task = (void *)task_address;
	struct task_struct *leader;
	struct blank *blank;
	struct proc *proc;
	struct key key;
	u32 uid, zero = 0;

	if (!who)
		return 0;
	key = *who;	/* 6.1 takes a key only from the stack */
	proc = bpf_map_lookup_elem(&procs, &key);
	uid = BPF_CORE_READ(task, cred, uid.val);
	if (proc) {
		if (proc->uid != uid)
			proc->uid = uid;
		return 0;
	}
	blank = bpf_map_lookup_elem(&blanks, &zero);
	if (!blank)
		return 0;
	if (bpf_map_update_elem(&procs, &key, blank, BPF_NOEXIST) == -7)
		count_full();
	proc = bpf_map_lookup_elem(&procs, &key);
	if (!proc)
		return 0;
	leader = BPF_CORE_READ(task, group_leader);
	proc->leader = (u64)leader;
	proc->uid = uid;
	comm_at(proc->comm, leader->comm);
	if (!BPF_CORE_READ(task, signal, live.counter))
		proc->exit = bpf_ktime_get_ns() | 1;
	tell(&key, SNIFFER_EVENT_SEEN);
	return 0;
}

/* The address of the first task of a process; 0 if the process has ended. */
static __always_inline u64 process_leader(const struct key *key)
{
	struct proc *proc = bpf_map_lookup_elem(&procs, key);
	struct task_struct *leader;

	if (!proc || proc->exit)
		return 0;
	leader = (void *)proc->leader;
	/* after an exec() by another thread that one is the leader */
	if (BPF_CORE_READ(leader, tgid) != key->tgid ||
	    BPF_CORE_READ(leader, start_boottime) != key->start)
		return 0;
	return (u64)leader;
}

#endif /* HUNTER_PROCESS_H */

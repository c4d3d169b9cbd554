/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_EVENTS_H
#define HUNTER_EVENTS_H
/*
 * Events of processes that use sockets. A process that lives a millisecond has gone
 * before /proc can be read. So its facts are stored when it is created or executes a
 * program, with or without sockets. Events only say which process to look up.
 */
#include "hunter.h"

#define EVENTS_BYTES	(128 << 10)
#define NAMES		48	/* of a path, and of mounts on its way, that are followed */
#define NAME_MASK	255	/* NAME_MAX */
#define PATH_MASK	255	/* SNIFFER_EXE_LEN - 1 and SNIFFER_CGROUP_LEN - 1 */
#define MOST_ARGS	0xffffffffUL

struct news {
	u64 time;
	struct key who;		/* unused: enum sniffer_event */
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, EVENTS_BYTES);
} events SEC(".maps");

/* Facts of the latest processes; time_ns and event are not set. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct key);
	__type(value, struct sniffer_process);
} abouts SEC(".maps");

/* A path is built from its end. The last name may reach beyond the middle. */
struct story {
	struct sniffer_process it;
	u32 at;
	u32 busy;	/* a task that another one interrupts is in the middle of it */
	char path[2 * SNIFFER_EXE_LEN + 8];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct story);
} stories SEC(".maps");

/* Puts "/name" before what is there. Returns false if there is no room. */
static __always_inline bool path_before(struct story *s, const void *name, u32 length)
{
	u32 at = s->at;

	length &= NAME_MASK;
	if (at > PATH_MASK || at < length + 1)
		return false;
	at -= length + 1;
	s->path[at & PATH_MASK] = '/';
	bpf_probe_read_kernel(s->path + (at & PATH_MASK) + 1, length, name);
	s->at = at;
	return true;
}

static __always_inline void path_end(struct story *s, char *to)
{
	u32 at = s->at & PATH_MASK;

	bpf_probe_read_kernel(to, (PATH_MASK - at) & PATH_MASK, s->path + at);
}

/* The path of a program as its process sees it: bpf_d_path() may be called from few places only. */
static __always_inline void exe_of(struct task_struct *task, struct story *s)
{
	struct file *file = BPF_CORE_READ(task, mm, exe_file);
	struct dentry *root, *dentry, *parent, *top;
	struct vfsmount *mount, *root_mount;
	struct mount *whole, *above;
	u32 length, i;

	s->at = PATH_MASK;
	if (!file)
		return;
	root = BPF_CORE_READ(task, fs, root.dentry);
	root_mount = BPF_CORE_READ(task, fs, root.mnt);
	dentry = BPF_CORE_READ(file, f_path.dentry);
	mount = BPF_CORE_READ(file, f_path.mnt);
	APART();
	for (i = 0; i < NAMES; i++) {
		if (!dentry || !mount || (dentry == root && mount == root_mount))
			break;
		top = BPF_CORE_READ(mount, mnt_root);
		parent = BPF_CORE_READ(dentry, d_parent);
		if (dentry == top || dentry == parent) {
			whole = (void *)mount - bpf_core_field_offset(struct mount, mnt);
			above = BPF_CORE_READ(whole, mnt_parent);
			if (!above || above == whole)
				break;
			dentry = BPF_CORE_READ(whole, mnt_mountpoint);
			mount = (void *)above + bpf_core_field_offset(struct mount, mnt);
			continue;
		}
		length = BPF_CORE_READ(dentry, d_name.len);
		if (!path_before(s, BPF_CORE_READ(dentry, d_name.name), length))
			break;
		dentry = parent;
	}
	path_end(s, s->it.exe);
}

/* Names of cgroups on v2 never change. */
static __always_inline void cgroup_of(struct task_struct *task, struct story *s)
{
	struct kernfs_node *node = BPF_CORE_READ(task, cgroups, dfl_cgrp, kn);
	struct kernfs_node *parent;
	const char *name;
	u32 length, i;

	s->it.cgroup_id = BPF_CORE_READ(node, id);
	s->at = PATH_MASK;
	APART();
	for (i = 0; i < NAMES; i++) {
		if (bpf_core_field_exists(((struct kernfs_node___new *)0)->__parent))
			parent = (void *)BPF_CORE_READ((struct kernfs_node___new *)node, __parent);
		else
			parent = BPF_CORE_READ(node, parent);
		if (!parent)
			break;
		name = BPF_CORE_READ(node, name);
		/* read it to learn its length, into the half that the path does not use */
		length = bpf_probe_read_kernel_str(s->path + SNIFFER_EXE_LEN, SNIFFER_EXE_LEN, name);
		if (!length || length > NAME_MASK || !path_before(s, name, length - 1))
			return;
		node = parent;
	}
	path_end(s, s->it.cgroup);
}

/* The process's number in its own pid namespace. */
static __always_inline void number_of(struct task_struct *task, struct sniffer_process *it)
{
	struct pid *pid = BPF_CORE_READ(task, signal, pids[1]);	/* PIDTYPE_TGID */
	struct upid *upid;

	upid = (void *)pid + bpf_core_field_offset(struct pid, numbers) +
	       (BPF_CORE_READ(pid, level) & 31) * bpf_core_type_size(struct upid);
	it->ns_tgid = BPF_CORE_READ(upid, nr);
	it->pidns = BPF_CORE_READ(upid, ns, ns.inum);
}

/* Copies a comm without what earlier names left after its NUL. */
static __always_inline void comm_at(char *to, const char *from)
{
	__builtin_memset(to, 0, SNIFFER_COMM_LEN);
	bpf_probe_read_kernel_str(to, SNIFFER_COMM_LEN, from);
}

static __always_inline void parent_at(struct task_struct *leader, struct sniffer_parent *to)
{
	to->tgid = BPF_CORE_READ(leader, tgid);
	comm_at(to->comm, leader->comm);
}

/* How current began. Its command line stays empty where a page would have to be fetched. */
static __always_inline void start_of(struct task_struct *task, struct sniffer_start *start)
{
	u64 begin = BPF_CORE_READ(task, mm, arg_start), end = BPF_CORE_READ(task, mm, arg_end);
	struct task_struct *leader = task;
	u64 size;
	u32 i;

	__builtin_memset(start, 0, sizeof(*start));
	for (i = 0; i < SNIFFER_PARENTS; i++) {
		leader = BPF_CORE_READ(leader, group_leader, real_parent, group_leader);
		if (!BPF_CORE_READ(leader, tgid))
			break;
		parent_at(leader, &start->parents[i]);
	}
	if (end <= begin)
		return;
	size = end - begin;
	if (size > SNIFFER_ARGS_LEN)
		size = SNIFFER_ARGS_LEN;
	asm volatile("" : "+r"(size));	/* else the verifier loses the bound */
	size &= 2 * SNIFFER_ARGS_LEN - 1;
	if (!bpf_probe_read_user(start->args, size, (void *)begin))
		start->args_len = end - begin > MOST_ARGS ? MOST_ARGS : end - begin;
}

/*
 * This processor's place to write a story, NULL while another task writes there. Then
 * the process stays without facts, and user space reads /proc.
 */
static __always_inline struct story *story_begin(void)
{
	u32 zero = 0;
	struct story *s = bpf_map_lookup_elem(&stories, &zero);

	if (s && __sync_fetch_and_add(&s->busy, 1)) {
		__sync_fetch_and_add(&s->busy, -1);
		return NULL;
	}
	return s;
}

static __always_inline void story_end(struct story *s)
{
	__sync_fetch_and_add(&s->busy, -1);
}

/* Stores the facts about the process of current (an address). */
__noinline int about(u64 task_address)
{
	struct task_struct *task = (void *)task_address;
	struct task_struct *leader = BPF_CORE_READ(task, group_leader);
	struct story *s = story_begin();
	struct key key = {};

	if (!s)
		return 0;
	__builtin_memset(s->it.exe, 0, sizeof(s->it.exe));
	__builtin_memset(s->it.cgroup, 0, sizeof(s->it.cgroup));
	key.start = BPF_CORE_READ(leader, start_boottime);
	key.tgid = BPF_CORE_READ(task, tgid);
	s->it.start_ns = key.start;
	s->it.tgid = key.tgid;
	s->it.ppid = BPF_CORE_READ(leader, real_parent, tgid);
	s->it.uid = BPF_CORE_READ(task, cred, uid.val);
	number_of(task, &s->it);
	bpf_probe_read_kernel_str(s->it.comm, SNIFFER_COMM_LEN, leader->comm);
	exe_of(task, s);
	cgroup_of(task, s);
	start_of(task, &s->it.start);
	bpf_map_update_elem(&abouts, &key, &s->it, BPF_ANY);
	story_end(s);
	return 0;
}

/* The child is like its parent until it executes another program. */
static __always_inline void about_child(struct task_struct *parent, struct task_struct *child)
{
	struct sniffer_process *it;
	struct key key = {};
	struct story *s;
	u32 i;

	key.start = parent->group_leader->start_boottime;
	key.tgid = parent->tgid;
	it = bpf_map_lookup_elem(&abouts, &key);
	if (!it) {
		about(address(parent));
		it = bpf_map_lookup_elem(&abouts, &key);
	}
	s = it ? story_begin() : NULL;
	if (!s)
		return;
	s->it = *it;
	key.start = child->group_leader->start_boottime;
	key.tgid = child->tgid;
	s->it.ppid = parent->tgid;
	s->it.start_ns = key.start;
	s->it.tgid = key.tgid;
	number_of(child, &s->it);
	for (i = SNIFFER_PARENTS - 1; i; i--)
		s->it.start.parents[i] = s->it.start.parents[i - 1];
	parent_at(parent->group_leader, &s->it.start.parents[0]);
	bpf_map_update_elem(&abouts, &key, &s->it, BPF_ANY);
	story_end(s);
}

/* Reports an enum sniffer_event of a process that uses sockets. */
static __always_inline void tell(const struct key *who, u32 event)
{
	struct news news = { .time = bpf_ktime_get_ns(), .who = *who };
	u64 wakeup = BPF_RB_NO_WAKEUP;
	struct counters *c;
	u32 cpu;

	news.who.unused = event;
	if (bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) > EVENTS_BYTES / 2)
		wakeup = BPF_RB_FORCE_WAKEUP;	/* else the reader comes within a second */
	if (!bpf_ringbuf_output(&events, &news, sizeof(news), wakeup))
		return;
	c = counters_here(&cpu);
	if (c)
		__sync_fetch_and_add(&c->events_lost, 1);
}

#endif /* HUNTER_EVENTS_H */

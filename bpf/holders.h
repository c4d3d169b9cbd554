/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_HOLDERS_H
#define HUNTER_HOLDERS_H
/*
 * Finds out who has a socket, from descriptor tables. This is done when a socket's last
 * user closes it. The process that closed it does the work.
 * Addresses of tasks and files are compared and read with checks: a failed read is no
 * match.
 */
#include "table.h"

#define SCAN	4	/* descriptors a step */
#define FDS_MAX	(1 << 20)
#define RING_LAG	(2 * SECOND)	/* until an io_uring lets go of a file that it has given up */

/*
 * Which descriptor is being closed:
 * - CLOSED: it has left the table already, and only its reference is there;
 * - LEAVING(fd): this one of current's table.
 * With WALK all descriptors are looked at, else only the one that is tried first.
 */
#define WALK		1
#define CLOSED		1
#define LEAVING(fd)	(((fd) + 1) << 1)
#define LEAVES(how)	((s32)((how) >> 1) - 1)

struct scan {
	u64 file;
	u64 fds;
	s32 found;
	s32 leaves;	/* -1: none */
};

static long scan_step(u32 i, struct scan *s)
{
	u64 at[SCAN] = {};
	int j;

	bpf_probe_read_kernel(at, sizeof(at), (void *)(s->fds + (u64)i * sizeof(at)));
#pragma unroll
	for (j = 0; j < SCAN; j++)
		if (at[j] == s->file && i * SCAN + j != s->leaves)
			s->found = i * SCAN + j + 1;
	return s->found != 0;
}

/* Reads a field of up to 8 bytes of a structure at an address. "at" is overwritten. */
#define READ_AT(at, from, type, field) ({						\
	u64 from__ = (from);								\
	(at) = 0;									\
	bpf_probe_read_kernel(&(at), bpf_core_field_size(((type *)0)->field),		\
			      (void *)(from__ + bpf_core_field_offset(type, field)));	\
	(at); })

/* Returns a task's descriptor of a file plus 1, or 0. @hint is tried first. */
static __always_inline int task_scan(u64 task, u64 file, s32 hint, u32 how)
{
	struct scan s = { .file = file, .leaves = -1 };
	u64 at, fdt;
	u32 max;

	/* all is read into one place on the stack: in 6.1 all frames share 512 bytes */
	if (READ_AT(at, task, struct task_struct, flags) & (PF_EXITING | PF_KTHREAD) || !file)
		return 0;
	if (!READ_AT(at, task, struct task_struct, files))
		return 0;
	if (how & ~WALK && at == (u64)bpf_get_current_task_btf()->files)
		s.leaves = LEAVES(how);
	fdt = READ_AT(at, at, struct files_struct, fdt);
	s.fds = READ_AT(at, fdt, struct fdtable, fd);
	max = READ_AT(at, fdt, struct fdtable, max_fds);
	if (hint >= 0 && hint < max && hint != s.leaves) {
		at = 0;
		bpf_probe_read_kernel(&at, sizeof(at), (void *)(s.fds + (u64)hint * 8));
		if (at == file)
			return hint + 1;
	}
	if (!(how & WALK))
		return 0;
	if (max > FDS_MAX)
		max = FDS_MAX;
	bpf_loop(max / SCAN, scan_step, &s, 0);
	return s.found;
}

__noinline int task_has(u64 task_address, u64 file, s32 hint, u32 how)
{
	return task_scan(task_address, file, hint, how);
}

struct threads {
	u64 head, pos, files, file;
	s32 hint, found;
	u32 how;
};

static long threads_step(u32 i, struct threads *c)
{
	struct task_struct *t;
	u64 files;

	if (c->pos == c->head || !c->pos)
		return 1;
	t = (void *)(c->pos - bpf_core_field_offset(struct task_struct, thread_node));
	files = (u64)BPF_CORE_READ(t, files);
	if (files && files != c->files)
		c->found = task_scan((u64)t, c->file, c->hint, c->how);
	c->pos = (u64)BPF_CORE_READ(t, thread_node.next);
	return c->found != 0;
}

/* The same for all tables of a process. */
__noinline int process_has(u64 leader_address, u64 file, s32 hint, u32 how)
{
	struct task_struct *leader = (void *)leader_address;
	struct signal_struct *signal;
	struct threads c = { .file = file, .hint = hint, .how = how };
	int found;

	if (!leader)
		return 0;
	found = task_has(leader_address, file, hint, how);
	signal = BPF_CORE_READ(leader, signal);
	if (found || BPF_CORE_READ(signal, nr_threads) < 2)
		return found;
	c.files = (u64)BPF_CORE_READ(leader, files);
	c.head = (u64)signal + bpf_core_field_offset(struct signal_struct, thread_head);
	c.pos = (u64)BPF_CORE_READ(signal, thread_head.next);
	bpf_loop(4096, threads_step, &c, 0);
	return c.found;
}

struct seek {
	u64 first, pos, file, best, start;
	s32 hint;
	u32 how;
	s32 fd;
};

static long seek_step(u32 i, struct seek *s)
{
	struct task_struct *t = (void *)(s->pos - bpf_core_field_offset(struct task_struct, tasks));
	u64 start;
	int fd;

	if (!s->pos || (i && s->pos == s->first))
		return 1;
	start = BPF_CORE_READ(t, start_boottime);
	if (start >= s->start) {
		fd = process_has((u64)t, s->file, s->hint, s->how);
		if (fd) {
			s->best = (u64)t;
			s->start = start;
			s->fd = fd - 1;
		}
	}
	s->pos = (u64)BPF_CORE_READ(t, tasks.next);
	return 0;
}

/* The youngest process that has a file, or 0. First @fd is tried, then all descriptors. */
static __always_inline u64 youngest(u64 file, s32 *fd, u32 how)
{
	struct task_struct *current = bpf_get_current_task_btf();
	struct seek s = { .file = file, .how = how & ~WALK };

	s.hint = *fd;
	s.pos = s.first = address(current->group_leader) +
			  bpf_core_field_offset(struct task_struct, tasks);
	bpf_loop(1 << 20, seek_step, &s, 0);
	if (!s.best) {
		s.how |= WALK;
		s.pos = s.first;
		bpf_loop(1 << 20, seek_step, &s, 0);
	}
	*fd = s.fd;
	return s.best;
}

/* Is the file at an address an io_uring? */
static __always_inline bool is_uring_at(u64 file)
{
	const unsigned char *from = BPF_CORE_READ((struct file *)file, f_path.dentry, d_name.name);
	char name[12];

	return bpf_probe_read_kernel_str(name, sizeof(name), from) > 0 &&
	       !bpf_strncmp(name, sizeof(name) - 1, "[io_uring]");
}

struct census {
	u64 file, fds, first, pos;
	u64 head, thread, last;	/* threads, and the table that was counted last */
	u32 count;	/* descriptors of that file */
	u16 seek;	/* look for an io_uring, too */
	u16 rings;
	s32 leaving, leaves;	/* LEAVES(), and that where the table is current's */
};

static long census_fd(u32 i, struct census *c)
{
	u64 file = 0;

	bpf_probe_read_kernel(&file, sizeof(file), (void *)(c->fds + (u64)i * 8));
	if (file == c->file)
		c->count++;	/* a descriptor that is being closed still has its reference */
	else if (c->seek && i != c->leaves && file && is_uring_at(file))
		c->rings = 1;
	return 0;
}

static __always_inline void census_table(u64 task, struct census *c)
{
	u64 at, fdt;
	u32 max;

	if (READ_AT(at, task, struct task_struct, flags) & (PF_EXITING | PF_KTHREAD) ||
	    !READ_AT(at, task, struct task_struct, files))
		return;
	c->leaves = at == (u64)bpf_get_current_task_btf()->files ? c->leaving : -1;
	fdt = READ_AT(at, at, struct files_struct, fdt);
	c->fds = READ_AT(at, fdt, struct fdtable, fd);
	max = READ_AT(at, fdt, struct fdtable, max_fds);
	bpf_loop(max > FDS_MAX ? FDS_MAX : max, census_fd, c, 0);
}

static long census_thread(u32 i, struct census *c)
{
	u64 task, leader, at;

	if (c->thread == c->head || !c->thread)
		return 1;
	leader = c->pos - bpf_core_field_offset(struct task_struct, tasks);
	task = c->thread - bpf_core_field_offset(struct task_struct, thread_node);
	READ_AT(at, task, struct task_struct, files);
	if (at && at != c->last && at != READ_AT(leader, leader, struct task_struct, files))
		census_table(task, c);
	c->last = at;
	READ_AT(c->thread, task, struct task_struct, thread_node.next);
	return 0;
}

/*
 * Counts in all tables of the process at pos. Neighbours in its list of threads that share
 * a table count once.
 */
static __always_inline void census_process(struct census *c)
{
	u64 leader = c->pos - bpf_core_field_offset(struct task_struct, tasks), signal, at;

	census_table(leader, c);
	READ_AT(signal, leader, struct task_struct, signal);
	if ((u32)READ_AT(at, signal, struct signal_struct, nr_threads) < 2)
		return;
	c->last = 0;
	c->head = signal + bpf_core_field_offset(struct signal_struct, thread_head);
	READ_AT(c->thread, signal, struct signal_struct, thread_head.next);
	bpf_loop(4096, census_thread, c, 0);
}

static long census_task(u32 i, struct census *c)
{
	if (!c->pos || (i && c->pos == c->first))
		return 1;
	census_process(c);
	bpf_probe_read_kernel(&c->pos, sizeof(c->pos), (void *)c->pos);
	return 0;
}

/*
 * The user has no descriptor of the socket, but may have it through an io_uring. If the
 * user has a ring, references without a descriptor are taken for the ring's.
 */
__noinline int in_ring(u64 cookie, u32 closing)
{
	struct owner *o = owner_find(cookie);
	struct census c = { .seek = 1, .leaving = LEAVES(closing) };
	struct proc *proc;
	struct key user;
	u64 leader;

	if (!o)
		return 0;
	user = o->user;
	c.file = o->file;
	proc = bpf_map_lookup_elem(&procs, &user);
	leader = process_leader(&user);
	if (!proc || !leader || !c.file || !(o->ring || proc->ring_files))
		return 0;
	c.pos = c.first = leader + bpf_core_field_offset(struct task_struct, tasks);
	if (proc->ring_numbers)
		c.rings = 1;
	else
		census_process(&c);
	if (c.rings && (o->many || proc->forked > o->since)) {
		c.seek = c.count = 0;
		bpf_loop(1 << 20, census_task, &c, 0);
		c.rings = file_refs(c.file) > c.count + (closing == CLOSED);
	}
	if (c.rings)
		owner_ring(o, &user);
	return c.rings;
}

/* The user of a socket may have closed it: find the new owner. closing: see CLOSED. */
__noinline int settle(u64 cookie, u32 closing)
{
	struct owner *o = owner_find(cookie);
	struct key user, one, heir = {};
	bool many, was_user = false;
	struct proc *proc;
	u64 file, leader;
	s32 fd, found;
	u32 how = (closing & ~CLOSED) | WALK;

	if (!o)
		return 0;
	bpf_spin_lock(&o->lock);
	user = o->user;
	file = o->file;
	fd = o->fd;
	many = o->many;
	if (!o->held)
		user.tgid = 0;
	bpf_spin_unlock(&o->lock);
	if (!user.tgid)
		return 0;
	proc = bpf_map_lookup_elem(&procs, &user);
	if (proc && proc->forked > o->since)
		many = true;
	leader = process_leader(&user);
	if (file && leader && (process_has(leader, file, fd, how) || in_ring(cookie, closing)))
		return 0;
	if (!file)
		goto inherit;
#define TRY_PAST(i) \
	one = o->past[i]; \
	if (!heir.tgid && one.tgid) { \
		leader = process_leader(&one); \
		found = leader ? process_has(leader, file, fd, how) : 0; \
		if (found) { \
			fd = found - 1; \
			heir = one; \
			was_user = true; \
		} \
	}
	TRY_PAST(0);
	TRY_PAST(1);
	TRY_PAST(2);
	/* if not many, no process can have it: the file is in flight, in a ring, or the kernel's */
	if (!heir.tgid && many) {
		leader = 0;
		if (proc && proc->child) {
			key_at((void *)proc->child, &one);
			if (same(&one, &proc->child_key)) {
				found = process_has(proc->child, file, fd, how);
				if (found) {
					leader = proc->child;
					fd = found - 1;
				}
			}
		}
		if (!leader)
			leader = youngest(file, &fd, how);
		if (leader) {
			key_at((void *)leader, &heir);
			process_enter(leader, &heir);
		}
	}
inherit:
	owner_inherit(o, &user, file, &heir, fd, was_user);
	return 0;
}

struct mine {
	struct key who;
	u64 files;	/* its table */
	u16 rings;	/* only sockets that it had through an io_uring */
	u16 unused;
	u32 closing;
};

static long settle_one(struct bpf_map *map, u64 *cookie, struct owner *o, struct mine *mine)
{
	if ((o->ring || !mine->rings) && same(&o->user, &mine->who))
		settle(*cookie, mine->closing);
	return 0;
}

/* A process has closed some sockets. Which ones is not known. */
static __always_inline void settle_mine(const struct key *who)
{
	struct mine mine = { .who = *who };

	if (bpf_map_lookup_elem(&procs, &mine.who))
		bpf_for_each_map_elem(&owners, settle_one, &mine, 0);
}

/*
 * An io_uring of a process ends or drops files. Sockets that only the ring has end with
 * them, a little later.
 */
static __always_inline void settle_rings(const struct key *who, u32 closing)
{
	struct mine mine = { .who = *who, .rings = 1, .closing = closing };
	struct proc *proc = bpf_map_lookup_elem(&procs, &mine.who);
	struct counters *c;
	u32 cpu;

	if (!proc || !(proc->rings || proc->ring_files))
		return;
	proc->doubt = bpf_ktime_get_ns() + RING_LAG;
	c = counters_here(&cpu);
	if (c)
		c->doubt = proc->doubt;
	bpf_for_each_map_elem(&owners, settle_one, &mine, 0);
}

static long settle_partner(struct bpf_map *map, u64 *cookie, struct owner *o, struct mine *mine)
{
	struct key user = o->user;
	u64 leader = o->held ? process_leader(&user) : 0;

	if (leader && (u64)BPF_CORE_READ((struct task_struct *)leader, files) == mine->files)
		settle(*cookie, 0);
	return 0;
}

/* Some descriptors of current's table are gone, for all processes that share the table. */
static __always_inline void settle_ours(struct task_struct *current)
{
	struct mine mine = { .files = (u64)current->files };

	key_of(current, &mine.who);
	if (bpf_map_lookup_elem(&procs, &mine.who))
		bpf_for_each_map_elem(&owners, settle_one, &mine, 0);
	if (current->files->count.counter > current->signal->nr_threads)
		bpf_for_each_map_elem(&owners, settle_partner, &mine, 0);
}

struct table {
	struct key who;
	u64 fds;
	u32 max;
};

static long settle_fd(u32 i, struct table *t)
{
	struct owner *o;
	u64 file = 0, cookie;

	bpf_probe_read_kernel(&file, sizeof(file), (void *)(t->fds + (u64)i * 8));
	cookie = file ? file_cookie(file) : 0;
	o = owner_find(cookie);
	if (o && same(&o->user, &t->who))
		settle(cookie, 0);
	return 0;
}

/* A task ends. Its descriptor table ends too, or stays with others that share it. */
static __always_inline void settle_table(struct files_struct *files, const struct key *who)
{
	struct table t = { .who = *who };
	struct fdtable *fdt = BPF_CORE_READ(files, fdt);
	u32 max = BPF_CORE_READ(fdt, max_fds);

	t.fds = (u64)BPF_CORE_READ(fdt, fd);
	bpf_loop(max > FDS_MAX ? FDS_MAX : max, settle_fd, &t, 0);
}

#endif /* HUNTER_HOLDERS_H */

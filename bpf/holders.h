/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_HOLDERS_H
#define HUNTER_HOLDERS_H
/*
 * Who has a socket, by the descriptor tables themselves. Asked when a socket's
 * last user lets go of it, in his context, when the descriptor is gone.
 * Addresses of tasks and files are compared and read, never followed blindly:
 * a read that fails is no match.
 */
#include "table.h"

#define SCAN	4	/* descriptors a step */
#define FDS_MAX	(1 << 20)
#define RING_LAG	(2 * SECOND)	/* until an io_uring lets go of a file that it has given up */

struct scan {
	u64 file;
	u64 fds;
	s32 found;
};

static long scan_step(u32 i, struct scan *s)
{
	u64 at[SCAN] = {};
	int j;

	bpf_probe_read_kernel(at, sizeof(at), (void *)(s->fds + (u64)i * sizeof(at)));
#pragma unroll
	for (j = 0; j < SCAN; j++)
		if (at[j] == s->file)
			s->found = i * SCAN + j + 1;
	return s->found != 0;
}

/* A field of up to 8 bytes of what is at an address, read by way of "at". */
#define READ_AT(at, from, type, field) ({						\
	u64 from__ = (from);								\
	(at) = 0;									\
	bpf_probe_read_kernel(&(at), bpf_core_field_size(((type *)0)->field),		\
			      (void *)(from__ + bpf_core_field_offset(type, field)));	\
	(at); })

/*
 * A descriptor of a file in a task's table, plus 1, or 0. One number is tried
 * first; without walk only that one is.
 */
static __always_inline int task_scan(u64 task, u64 file, s32 hint, u32 walk)
{
	struct scan s = { .file = file };
	u64 at, fdt;
	u32 max;

	/* one place on the stack for all that is read: in 6.1 all frames share 512 bytes */
	if (READ_AT(at, task, struct task_struct, flags) & (PF_EXITING | PF_KTHREAD) || !file)
		return 0;
	if (!READ_AT(at, task, struct task_struct, files))
		return 0;
	fdt = READ_AT(at, at, struct files_struct, fdt);
	s.fds = READ_AT(at, fdt, struct fdtable, fd);
	max = READ_AT(at, fdt, struct fdtable, max_fds);
	if (hint >= 0 && hint < max) {
		at = 0;
		bpf_probe_read_kernel(&at, sizeof(at), (void *)(s.fds + (u64)hint * 8));
		if (at == file)
			return hint + 1;
	}
	if (!walk)
		return 0;
	if (max > FDS_MAX)
		max = FDS_MAX;
	bpf_loop(max / SCAN, scan_step, &s, 0);
	return s.found;
}

__noinline int task_has(u64 task_address, u64 file, s32 hint, u32 walk)
{
	return task_scan(task_address, file, hint, walk);
}

struct threads {
	u64 head, pos, files, file;
	s32 hint, found;
	u32 walk;
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
		c->found = task_scan((u64)t, c->file, c->hint, c->walk);
	c->pos = (u64)BPF_CORE_READ(t, thread_node.next);
	return c->found != 0;
}

/* The same over all tables of a process. */
__noinline int process_has(u64 leader_address, u64 file, s32 hint, u32 walk)
{
	struct task_struct *leader = (void *)leader_address;
	struct signal_struct *signal;
	struct threads c = { .file = file, .hint = hint, .walk = walk };
	int found;

	if (!leader)
		return 0;
	found = task_has(leader_address, file, hint, walk);
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
	u16 walk;
	u16 unused;
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
		fd = process_has((u64)t, s->file, s->hint, s->walk);
		if (fd) {
			s->best = (u64)t;
			s->start = start;
			s->fd = fd - 1;
		}
	}
	s->pos = (u64)BPF_CORE_READ(t, tasks.next);
	return 0;
}

/* The youngest process that has a file, or 0: first by number, then anywhere. */
static __always_inline u64 youngest(u64 file, s32 *fd)
{
	struct task_struct *current = bpf_get_current_task_btf();
	struct seek s = { .file = file };

	s.hint = *fd;
	s.pos = s.first = address(current->group_leader) +
			  bpf_core_field_offset(struct task_struct, tasks);
	bpf_loop(1 << 20, seek_step, &s, 0);
	if (!s.best) {
		s.walk = 1;
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
	u32 count;	/* descriptors of that file */
	u16 seek;	/* look for an io_uring, too */
	u16 rings;
};

static long census_fd(u32 i, struct census *c)
{
	u64 file = 0;

	bpf_probe_read_kernel(&file, sizeof(file), (void *)(c->fds + (u64)i * 8));
	if (file == c->file)
		c->count++;
	else if (c->seek && file && is_uring_at(file))
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
	fdt = READ_AT(at, at, struct files_struct, fdt);
	c->fds = READ_AT(at, fdt, struct fdtable, fd);
	max = READ_AT(at, fdt, struct fdtable, max_fds);
	bpf_loop(max > FDS_MAX ? FDS_MAX : max, census_fd, c, 0);
}

static long census_task(u32 i, struct census *c)
{
	if (!c->pos || (i && c->pos == c->first))
		return 1;
	census_table(c->pos - bpf_core_field_offset(struct task_struct, tasks), c);
	bpf_probe_read_kernel(&c->pos, sizeof(c->pos), (void *)c->pos);
	return 0;
}

/*
 * The user has no descriptor of a socket, but may have it by an io_uring. What
 * no descriptor refers to is taken for a ring's, if he has one.
 */
__noinline int in_ring(u64 cookie, u32 closing)
{
	struct owner *o = owner_find(cookie);
	struct census c = { .seek = 1 };
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
	if (proc->ring_numbers)
		c.rings = 1;
	else
		census_table(leader, &c);
	if (c.rings && (o->many || proc->forked > o->since)) {
		c.seek = c.count = 0;
		c.pos = c.first = leader + bpf_core_field_offset(struct task_struct, tasks);
		bpf_loop(1 << 20, census_task, &c, 0);
		c.rings = file_refs(c.file) > c.count + closing;
	}
	if (c.rings)
		owner_ring(o, &user);
	return c.rings;
}

/*
 * The user of a socket may have let go of it: who has it now is named. closing:
 * the descriptor has gone, and its reference is about to.
 */
__noinline int settle(u64 cookie, u32 closing)
{
	struct owner *o = owner_find(cookie);
	struct key user, one, heir = {};
	bool many, was_user = false;
	struct proc *proc;
	u64 file, leader;
	s32 fd, found;

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
	if (file && leader && (process_has(leader, file, fd, 1) || in_ring(cookie, closing)))
		return 0;
	if (!file)
		goto inherit;
#define TRY_PAST(i) \
	one = o->past[i]; \
	if (!heir.tgid && one.tgid) { \
		leader = process_leader(&one); \
		found = leader ? process_has(leader, file, fd, 1) : 0; \
		if (found) { \
			fd = found - 1; \
			heir = one; \
			was_user = true; \
		} \
	}
	TRY_PAST(0);
	TRY_PAST(1);
	TRY_PAST(2);
	/* else nobody can have got it: it is on its way, in a ring, or the kernel's */
	if (!heir.tgid && many) {
		leader = 0;
		if (proc && proc->child) {
			key_at((void *)proc->child, &one);
			if (same(&one, &proc->child_key)) {
				found = process_has(proc->child, file, fd, 1);
				if (found) {
					leader = proc->child;
					fd = found - 1;
				}
			}
		}
		if (!leader)
			leader = youngest(file, &fd);
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
	u32 rings;	/* only what it had by an io_uring */
};

static long settle_one(struct bpf_map *map, u64 *cookie, struct owner *o, struct mine *mine)
{
	if ((o->ring || !mine->rings) && same(&o->user, &mine->who))
		settle(*cookie, 0);
	return 0;
}

/* A process has closed what it may be the last user of: not known which. */
static __always_inline void settle_mine(const struct key *who)
{
	struct mine mine = { .who = *who };

	if (bpf_map_lookup_elem(&procs, &mine.who))
		bpf_for_each_map_elem(&owners, settle_one, &mine, 0);
}

/*
 * An io_uring of a process goes or loses files, and with it the sockets that it
 * alone has; it lets go of them a little later.
 */
static __always_inline void settle_rings(const struct key *who)
{
	struct mine mine = { .who = *who, .rings = 1 };
	struct proc *proc = bpf_map_lookup_elem(&procs, &mine.who);

	if (!proc || !(proc->rings || proc->ring_files))
		return;
	proc->doubt = bpf_ktime_get_ns() + RING_LAG;
	bpf_for_each_map_elem(&owners, settle_one, &mine, 0);
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

/* A process ends, and leaves its descriptor table to others that share it. */
static __always_inline void settle_table(struct files_struct *files, const struct key *who)
{
	struct table t = { .who = *who };
	struct fdtable *fdt = BPF_CORE_READ(files, fdt);
	u32 max = BPF_CORE_READ(fdt, max_fds);

	t.fds = (u64)BPF_CORE_READ(fdt, fd);
	bpf_loop(max > FDS_MAX ? FDS_MAX : max, settle_fd, &t, 0);
}

static long collect_owner(struct bpf_map *map, u64 *cookie, struct owner *o, u64 *now)
{
	u64 dead = o->dead;
	struct proc *user;
	struct key who;

	if (o->ring) {
		who = o->user;
		user = bpf_map_lookup_elem(&procs, &who);
		if (user && user->doubt)
			settle(*cookie, 0);
	}

	if (dead && *now > dead + (o->via || o->waits ? owner_keep_wait : owner_keep)) {
		u64 key = *cookie;

		bpf_map_delete_elem(&owners, &key);
	}
	return 0;
}

static long collect_proc(struct bpf_map *map, struct key *key, struct proc *p, u64 *now)
{
	/* the last look was a later one */
	if (p->doubt && *now > p->doubt)
		p->doubt = 0;
	if (p->exit && *now > p->exit + owner_keep_wait) {
		struct key gone = *key;

		bpf_map_delete_elem(&procs, &gone);
	}
	return 0;
}

/*
 * User space runs it each second: what has ended long enough ago is forgotten.
 * A program of this kind can be run so and may use maps with locks.
 */
SEC("tc")
int collect(struct __sk_buff *unused)
{
	u64 now = bpf_ktime_get_ns();

	bpf_for_each_map_elem(&owners, collect_owner, &now, 0);
	bpf_for_each_map_elem(&procs, collect_proc, &now, 0);
	return 0;
}

#endif /* HUNTER_HOLDERS_H */

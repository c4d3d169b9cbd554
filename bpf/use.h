/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_USE_H
#define HUNTER_USE_H
/*
 * What a process does to a socket: it creates, uses, receives or closes it; it forks,
 * executes a program or exits.
 */
#include "holders.h"

#ifdef __TARGET_ARCH_x86
#include <asm/unistd_64.h>
#else
#include <asm/unistd.h>
#endif

#define CALL_MASK	0xffff	/* of x86: without the mark of x32 */

/*
 * The process that was last found not to have a certain socket, see stranger_mark(). This
 * avoids a search for each packet that a firewall's daemon or the user of a network disk
 * handles.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} strangers SEC(".maps");

u64 gains = 0;	/* descriptors received so far: with one more, a stranger may be none */

/* Calls of 32 bits have other numbers. */
static __always_inline bool is_compat(struct task_struct *current)
{
#ifdef __TARGET_ARCH_x86
	return ((struct task_struct___x86 *)current)->thread_info.status & TS_COMPAT;
#else
	return ((struct task_struct___arm *)current)->thread_info.flags & (1 << TIF_32BIT);
#endif
}

/*
 * Does current's system call only look at a socket? While it holds the socket's lock,
 * packets wait. They are another process's, though this one then sends what they allow
 * to send.
 */
static __always_inline bool call_looks(struct task_struct *current)
{
	struct pt_regs *regs = (void *)bpf_task_pt_regs(current);

	if (current->flags & PF_IO_WORKER || is_compat(current))
		return false;
	switch (BPF_CORE_READ(regs, CALL_FIELD) & CALL_MASK) {
	case __NR_getsockopt:
	case __NR_getsockname:
	case __NR_getpeername:
	case __NR_ioctl:
		return true;
	}
	return false;
}

static __always_inline bool has_uring(struct task_struct *task)
{
	if (task->flags & PF_IO_WORKER)
		return true;
	return bpf_core_field_exists(task->io_uring) && task->io_uring;
}

/*
 * Process, socket and gains in one word, since another task may come between two writes.
 * The multipliers are odd and random.
 */
static __always_inline u64 stranger_mark(u64 cookie, const struct key *who)
{
	u64 mark = cookie * 0x9e3779b97f4a7c15ULL + who->start;

	mark = (mark ^ mark >> 29) * 0xbf58476d1ce4e5b9ULL + who->tgid;
	return (mark ^ mark >> 32) * 0x94d049bb133111ebULL + gains;
}

/*
 * May current be the user of a socket, if another process used it last? Yes if
 * - it has the socket in its descriptor table;
 * - it has it in an io_uring, and has called for it;
 * - nobody knows the socket, and current is closing it.
 * In all other cases no: the kernel also sends packets of others in the context
 * of a process, and calls for their sockets.
 */
static __always_inline bool use_is_possible(struct gain *g, struct owner *o, u64 cookie,
					    struct task_struct *current, bool called)
{
	s32 hint = o ? o->fd : -1;
	u64 *known, mark;
	u32 zero = 0;

	if (!called && o && o->held && call_looks(current))
		return false;
	if (g->file) {
		g->fd = task_has(bpf_get_current_task(), g->file, hint, 0) - 1;
		if (g->fd >= 0)
			return true;
	}
	/* a task with PF_MEMALLOC does block I/O, for whoever uses the disk */
	if (called && !(current->flags & PF_MEMALLOC) && has_uring(current)) {
		g->ring = 1;
		return true;
	}
	if (!g->file)
		return false;
	known = bpf_map_lookup_elem(&strangers, &zero);
	mark = stranger_mark(cookie, &g->who);
	if (known && *known == mark)
		return false;
	g->fd = task_has(bpf_get_current_task(), g->file, -1, 1) - 1;
	if (g->fd >= 0 || (!o && !file_refs(g->file)))
		return true;
	if (known)
		*known = mark;
	return false;
}

/* Enters the socket that current has got. */
static __always_inline void use_gain(u64 cookie, struct gain *g, struct task_struct *current)
{
	struct files_struct *files = current->files;
	struct proc *proc;

	process_enter(bpf_get_current_task(), &g->who);
	/* another process with the same table (clone() with CLONE_FILES) has it at once */
	g->many = files && files->count.counter > current->signal->nr_threads;
	if (g->ring) {
		proc = bpf_map_lookup_elem(&procs, &g->who);
		if (proc)
			proc->rings++;
	}
	owner_gain(cookie, g);
}

/*
 * The current process uses a socket, or seems to. called: it has named this very socket
 * in a call. Returns 0 if the use is another process's.
 */
__noinline int use(u64 cookie, u64 file, u32 called)
{
	struct task_struct *current = bpf_get_current_task_btf();
	struct gain g = { .file = file, .tid = current->pid, .fd = -1 };
	struct proc *proc;
	struct owner *o;

	o = owner_find(cookie);
	if (current->flags & PF_KTHREAD) {
		/* a process that gave it to the kernel and has exited is no longer its user */
		proc = called && o && !o->held ? bpf_map_lookup_elem(&procs, &o->user) : NULL;
		if (proc && proc->exit && !o->released)
			o->servers = 1;
		return 1;
	}
	key_of(current, &g.who);
	if (o && !o->via && same(&o->user, &g.who)) {
		/* its own end of a socket that it has closed is no use */
		if (!called && !o->held)
			return 1;
		if (o->held && o->tid && o->file) {
			if (o->tid != g.tid)
				o->tid = g.tid;
			return 1;
		}
		g.fd = file ? task_has(bpf_get_current_task(), file, o->fd, 0) - 1 : -1;
		g.ring = o->ring || (!o->held && g.fd < 0 && has_uring(current));
	} else if (!use_is_possible(&g, o, cookie, current, called)) {
		return 0;
	}
	use_gain(cookie, &g, current);
	return 1;
}

/* Nearly always the process that used it last uses it again: then only read. */
static __always_inline struct owner *owner_plain(u64 cookie, struct task_struct *current)
{
	struct owner *o = owner_find(cookie);
	u32 tid = current->pid;

	if (!o || o->via || !o->held || !o->file || !o->tid ||
	    o->user.tgid != current->tgid ||
	    o->user.start != current->group_leader->start_boottime)
		return NULL;
	if (o->tid != tid)
		o->tid = tid;
	return o;
}

static __always_inline bool use_is_plain(u64 cookie, struct task_struct *current)
{
	return owner_plain(cookie, current);
}

/* The current process created or accepted a socket, or received a descriptor of one. */
__noinline int use_take(u64 cookie, u64 file, u32 flags)
{
	struct task_struct *current = bpf_get_current_task_btf();
	struct gain g = { .file = file, .tid = current->pid, .fd = -1, .flags = flags };

	if (current->flags & PF_KTHREAD || !cookie)
		return 0;
	key_of(current, &g.who);
	if (flags & SNIFFER_F_INHERITED)
		__sync_fetch_and_add(&gains, 1);
	use_gain(cookie, &g, current);
	return 0;
}

#endif /* HUNTER_USE_H */

/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_TABLE_H
#define HUNTER_TABLE_H
/*
 * The owner table: socket cookie -> the process that its packets belong to.
 *
 * | state    | fields            | who is named                | left when                        |
 * |----------|-------------------|-----------------------------|----------------------------------|
 * | (none)   | no entry          | nobody, with a reason       | created, used, found at load; a  |
 * |          |                   |                             | handshake ends: VIA; the kernel  |
 * |          |                   |                             | accepts or closes it: SERVER     |
 * | VIA      | via               | the listener's user, or the | accepted: HELD; 130 s            |
 * |          |                   | MPTCP parent's              |                                  |
 * | SERVER   | server            | nobody: it is the kernel's  | a process uses it: HELD; freed   |
 * | HELD     | user, held        | user                        | another one who has it uses or   |
 * |          |                   |                             | receives it: HELD, the old user  |
 * |          |                   |                             | joins the past; user closes it:  |
 * |          |                   |                             | settle                           |
 * | (settle) | user, held, file, | user, DEAD if it exited     | at once, by the task that closed |
 * |          | exit              |                             | it: HELD by an heir; UNHELD      |
 * | UNHELD   | user, not held    | user, flagged DEAD          | somebody uses or receives it:    |
 * |          |                   |                             | HELD; the kernel uses it, and    |
 * |          |                   |                             | user has exited: SERVER; its     |
 * |          |                   |                             | file goes: RELEASED              |
 * | RELEASED | released          | user, flagged DEAD          | freed                            |
 * | dead     | dead              | user, flagged DEAD          | 2 s, or 130 s after a state that |
 * |          |                   |                             | leaves a TIME_WAIT               |
 *
 * Rules, each checked on real traffic:
 * - the last process that used a socket and still has it owns its packets;
 * - a process that does not have a socket does not use it, whatever runs in its context;
 * - of several who have a socket, whose receive call waits longest gets the next datagram;
 * - receiving a descriptor (SCM_RIGHTS, pidfd_getfd) is a use;
 * - the table has no list of holders. When the user closes the socket, holders.c searches
 *   descriptor tables. The heir is the latest earlier user that still has it. Without one it is
 *   another holder: a guess, flagged AMBIGUOUS while there are several;
 * - a process without a descriptor of its socket keeps it while its io_uring may refer to it:
 *   the file has references that no descriptor explains;
 * - an entry outlives its socket: TIME_WAIT and orphans still send.
 *
 * The rules are those of kmod/owner.c, word for word; a test compares them. An
 * entry that is dead is collected by user space, which runs collect() for it.
 */
#include "process.h"

/* A process has got a socket. The names are those of struct sniffer_gain. */
struct gain {
	struct key who;
	u64 file;
	u32 tid;
	s32 fd;			/* -1: not known */
	u16 flags;
	u8 ring;
	u8 many;
};

static __always_inline struct owner *owner_find(u64 cookie)
{
	return cookie ? bpf_map_lookup_elem(&owners, &cookie) : NULL;
}

static __always_inline struct owner *owner_make(u64 cookie)
{
	struct blank *blank;
	u32 zero = 0;

	blank = bpf_map_lookup_elem(&blanks, &zero);
	if (!blank)
		return NULL;
	if (bpf_map_update_elem(&owners, &cookie, blank, BPF_NOEXIST) == -7)
		count_full();
	return bpf_map_lookup_elem(&owners, &cookie);
}

/* Under the lock. As far as is known, its user no longer has it. */
static __always_inline void owner_let_go(struct owner *o)
{
	o->held = 0;
	o->ring = 0;
}

/* Under the lock. Removes a process from the earlier users. */
static __always_inline void owner_forget(struct owner *o, const struct key *who)
{
	if (same(&o->past[0], who)) {
		o->past[0] = o->past[1];
		o->past[1] = o->past[2];
		o->past[2].tgid = 0;
	} else if (same(&o->past[1], who)) {
		o->past[1] = o->past[2];
		o->past[2].tgid = 0;
	} else if (same(&o->past[2], who)) {
		o->past[2].tgid = 0;
	}
}

/*
 * Under the lock. Makes a process the user. If keep, the user before may still have the
 * socket and becomes an earlier one.
 */
static __always_inline void owner_set_user(struct owner *o, const struct key *who, bool kept)
{
	struct key old = o->user;

	if (!same(&old, who)) {
		owner_let_go(o);
		owner_forget(o, who);
		if (old.tgid && kept && !o->guess) {
			o->past[2] = o->past[1];
			o->past[1] = o->past[0];
			o->past[0] = old;
		}
		o->user = *who;
	}
	o->held = 1;
}

/* A process uses or has received a socket. */
__noinline int owner_gain(u64 cookie, struct gain *g)
{
	struct owner *o;
	bool known, seeded, kept = true;
	struct proc *old;
	struct key user;
	u64 now;

	if (!g || !cookie)
		return 0;
	now = bpf_ktime_get_ns();
	o = owner_find(cookie);
	known = o;
	if (!known)
		o = owner_make(cookie);
	if (!o)
		return 0;
	seeded = g->flags & SNIFFER_F_SEEDED;
	user = o->user;
	if (user.tgid && !same(&user, &g->who)) {
		old = bpf_map_lookup_elem(&procs, &user);
		kept = old && !old->exit;
	}
	bpf_spin_lock(&o->lock);
	user = o->user;
	if (o->via || (!known && !(g->flags & (SNIFFER_F_SEEDED | SNIFFER_F_INHERITED))))
		o->creator = g->who.tgid;
	if (!user.tgid)
		o->since = now;
	if (g->many || (user.tgid && !same(&user, &g->who)) || g->flags & SNIFFER_F_INHERITED)
		o->many = 1;
	if (g->file && !o->released)
		o->file = g->file;
	if (!user.tgid || !seeded || o->guess) {
		if (g->flags)
			o->flags = (o->flags & ~SNIFFER_F_INHERITED) | g->flags;
		owner_set_user(o, &g->who, kept);
		o->tid = g->tid;
		o->guess = seeded;
		o->blind = 0;
		o->ring = g->ring;
		if (g->fd >= 0)
			o->fd = g->fd;
	}
	/* the hooks read without the lock: until there is a user they ask the listener */
	if (o->via) {
		o->dead = 0;
		o->via = 0;
	}
	bpf_spin_unlock(&o->lock);
	return 0;
}

/* The user of a socket has closed it. The heir is named; tgid 0: nobody has it. */
static __always_inline void owner_inherit(struct owner *o, const struct key *from, u64 file,
					  const struct key *heir, s32 fd, bool past)
{
	bpf_spin_lock(&o->lock);
	if (same(&o->user, from) && o->held && o->file == file) {
		if (heir->tgid) {
			owner_set_user(o, heir, false);
			o->tid = 0;
			o->guess = !past;
			o->many = 1;
			o->flags |= SNIFFER_F_INHERITED;
			o->ring = 0;
			o->fd = fd;
		} else {
			owner_let_go(o);
		}
	}
	bpf_spin_unlock(&o->lock);
}

/* The user has it through an io_uring, without a descriptor. */
static __always_inline void owner_ring(struct owner *o, const struct key *user)
{
	struct proc *proc;

	if (o->ring)
		return;
	proc = bpf_map_lookup_elem(&procs, user);
	if (proc)
		proc->rings++;
	bpf_spin_lock(&o->lock);
	if (same(&o->user, user) && o->held)
		o->ring = 1;
	bpf_spin_unlock(&o->lock);
}

/* Lets another socket's owner own a socket's packets. */
static __always_inline void owner_refer(u64 cookie, u64 via, u8 how)
{
	struct owner *o = owner_find(cookie);
	u64 now = bpf_ktime_get_ns();

	if (o && (!o->via || o->via_how == how))
		return;
	if (!o)
		o = owner_make(cookie);
	if (!o)
		return;
	bpf_spin_lock(&o->lock);
	if (!o->user.tgid) {
		o->via = via;
		o->via_how = how;
		/* the end of such a socket is not seen: forget it in time, unless it is accepted */
		o->dead = now;
	}
	bpf_spin_unlock(&o->lock);
}

/* The socket is the kernel's own. It stays known as such when only its cookie is left. */
static __always_inline void owner_kernel(u64 cookie)
{
	struct owner *o = owner_make(cookie);

	if (o && !o->user.tgid) {
		o->servers = 1;
		o->waits = 1;
		o->dead = bpf_ktime_get_ns();
	}
}

/* A socket loses its file, so no process has it any more. */
static __always_inline void owner_release(u64 cookie)
{
	struct owner *o = owner_find(cookie);

	if (!o)
		return;
	bpf_spin_lock(&o->lock);
	if (!o->via) {
		owner_let_go(o);
		o->file = 0;
		o->released = 1;
		o->past[0].tgid = o->past[1].tgid = o->past[2].tgid = 0;
	}
	bpf_spin_unlock(&o->lock);
}

/*
 * May another process than the user have the socket? Never false if one has it. A
 * descriptor in flight counts as another process, and so does a thread that waits in a
 * call.
 */
static __always_inline bool owner_shared(const struct owner *o, const struct proc *user)
{
	u64 file = o->file;

	if (!o->many && user->forked <= o->since)
		return false;
	return file && file_refs(file) > 1;
}

#endif /* HUNTER_TABLE_H */

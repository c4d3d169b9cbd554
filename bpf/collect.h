/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_COLLECT_H
#define HUNTER_COLLECT_H
/* Removes sockets and processes that ended some time ago. */
#include "holders.h"

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
	/* its sockets have just been looked at */
	if (p->doubt && *now > p->doubt)
		p->doubt = 0;
	if (p->exit && *now > p->exit + owner_keep_wait) {
		struct key gone = *key;

		bpf_map_delete_elem(&procs, &gone);
	}
	return 0;
}

/*
 * User space runs it each second, or more rarely where it takes long and little
 * happens. It removes what ended some time ago. User space can run a program of this
 * kind, and it may use maps with locks.
 */
SEC("tc")
int collect(struct __sk_buff *unused)
{
	u64 now = bpf_ktime_get_ns();

	bpf_for_each_map_elem(&owners, collect_owner, &now, 0);
	bpf_for_each_map_elem(&procs, collect_proc, &now, 0);
	return 0;
}

#endif /* HUNTER_COLLECT_H */

/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_RINGS_H
#define HUNTER_RINGS_H
/*
 * Counts the files that a process has through an io_uring, without a descriptor. Which
 * files they are is not known. Like kmod/rings.c.
 */
#include "use.h"

/* enum io_uring_register_op as far as it is about files */
enum {
	RINGS_FILES		= 2,
	RINGS_NO_FILES		= 3,
	RINGS_UPDATE		= 6,
	RINGS_FILES2		= 13,
	RINGS_UPDATE2		= 14,
	RINGS_NUMBERS		= 20,	/* rings, in place of their descriptors */
	RINGS_NO_NUMBERS	= 21,
};

/* At the end of io_uring_register(). */
SEC("tp_btf/io_uring_register")
int BPF_PROG(probe_ring, void *ring, u32 opcode, u32 files, u32 buffers, long ret)
{
	struct task_struct *current = bpf_get_current_task_btf();
	struct proc *proc;
	struct key who;

	if (ret < 0)
		return 0;
	switch (opcode) {
	case RINGS_FILES:
	case RINGS_NO_FILES:
	case RINGS_UPDATE:
	case RINGS_FILES2:
	case RINGS_UPDATE2:
	case RINGS_NUMBERS:
	case RINGS_NO_NUMBERS:
		break;
	default:
		return 0;
	}
	key_of(current, &who);
	process_enter(bpf_get_current_task(), &who);
	proc = bpf_map_lookup_elem(&procs, &who);
	if (!proc)
		return 0;
	/* threads may count at once: at worst the process seems to have a ring too many */
	if (opcode == RINGS_NUMBERS)
		proc->ring_numbers += ret;
	else if (opcode == RINGS_NO_NUMBERS)
		proc->ring_numbers -= ret < proc->ring_numbers ? ret : proc->ring_numbers;
	else
		proc->ring_files = 1;
	if (opcode == RINGS_NO_FILES || opcode == RINGS_UPDATE || opcode == RINGS_UPDATE2)
		settle_rings(&who, 0);
	return 0;
}

/* An operation of an io_uring removes a file from the ring. The ring drops it later. */
static __always_inline int rings_forget(void)
{
	struct key who;

	key_of(bpf_get_current_task_btf(), &who);
	settle_rings(&who, 0);
	return 0;
}

SEC("fentry/io_fixed_fd_remove")
int BPF_PROG(probe_ring_closes) { return rings_forget(); }
SEC("fentry/io_files_update")
int BPF_PROG(probe_ring_updates) { return rings_forget(); }

#endif /* HUNTER_RINGS_H */

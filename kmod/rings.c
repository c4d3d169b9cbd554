// SPDX-License-Identifier: GPL-2.0-only
/*
 * Counts the files that a process has through an io_uring, without a descriptor. Which
 * files they are is not known.
 */
#include <linux/kernel.h>

#include "process.h"
#include "rings.h"
#include "use.h"

/* The operations of io_uring_register() about files; older headers lack the newer ones. */
enum {
	RINGS_FILES		= 2,
	RINGS_NO_FILES		= 3,
	RINGS_UPDATE		= 6,
	RINGS_FILES2		= 13,
	RINGS_UPDATE2		= 14,
	RINGS_NUMBERS		= 20,	/* about the rings themselves, in place of descriptors */
	RINGS_NO_NUMBERS	= 21,
};

/**
 * sniffer_rings_forget - the current process removes a file from an io_uring
 */
void sniffer_rings_forget(void)
{
	struct sniffer_proc *proc;

	rcu_read_lock();
	proc = sniffer_process_find(current);
	if (proc)
		sniffer_process_doubt(proc);
	rcu_read_unlock();
}

/* Threads may count at the same time. At worst the process seems to have one ring too many. */
static void rings_note(struct sniffer_proc *proc, unsigned int opcode, long ret)
{
	unsigned int numbers = READ_ONCE(proc->ring_numbers);

	if (opcode == RINGS_NUMBERS)
		WRITE_ONCE(proc->ring_numbers, numbers + ret);
	else if (opcode == RINGS_NO_NUMBERS)
		WRITE_ONCE(proc->ring_numbers, numbers - min_t(unsigned int, numbers, ret));
	else
		WRITE_ONCE(proc->ring_files, true);
}

/**
 * sniffer_rings_registered - the current process has called io_uring_register()
 * @opcode: enum io_uring_register_op
 * @ret: its return value
 */
void sniffer_rings_registered(unsigned int opcode, long ret)
{
	struct sniffer_proc *proc;

	if (ret < 0)
		return;
	switch (opcode) {
	case RINGS_NO_FILES:
		sniffer_use_rings_end();
		return;
	case RINGS_UPDATE:
	case RINGS_UPDATE2:
		sniffer_rings_forget();
		break;
	case RINGS_FILES:
	case RINGS_FILES2:
	case RINGS_NUMBERS:
	case RINGS_NO_NUMBERS:
		break;
	default:
		return;
	}
	proc = sniffer_process_get(current);
	if (!proc)
		return;
	rings_note(proc, opcode, ret);
	sniffer_process_put(proc);
}

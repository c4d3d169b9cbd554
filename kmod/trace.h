/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_TRACE_H
#define SNIFFER_TRACE_H

#include <linux/ftrace.h>
#include <linux/kprobes.h>
#include <linux/types.h>

#include "compat.h"

/* The first arguments of a traced function. */
struct sniffer_args {
	unsigned long n[5];
	unsigned long ip;	/* where it was called; about the function's address */
};

typedef void (*sniffer_trace_handler)(const struct sniffer_args *args);

/**
 * struct sniffer_trace_group - functions that one ftrace_ops tells of
 * @ops: its function calls the one handler of all of them
 * @lazy: told between sniffer_trace_start() and sniffer_trace_stop() only
 * @registered: are they told now?
 *
 * Set at load; later @registered is written by who starts and stops, one at a time.
 */
struct sniffer_trace_group {
	struct ftrace_ops ops;
	bool lazy;
	bool registered;
};

/**
 * struct sniffer_trace - a function of the kernel that we are told of
 * @symbol: its name
 * @handler: what is called, preemption or interrupts perhaps off
 * @bit: enum sniffer_probe, 0 when names are right without it
 * @ways: of descriptors to go, that it tells of
 * @group: tells of it without looking its handler up; NULL: it is called rarely
 * @ip: where it is, 0 when not known
 * @ops: of its own, where @ip is not known
 * @kprobe: used while @probed
 * @traced: told by ftrace
 * @probed: told by a kprobe
 *
 * All of it is set at load, by one thread, before the first call is told.
 */
struct sniffer_trace {
	const char *symbol;
	sniffer_trace_handler handler;
	u32 bit;
	u32 ways;
	struct sniffer_trace_group *group;
	unsigned long ip;
	struct ftrace_ops ops;
	struct kprobe kprobe;
	bool traced;
	bool probed;
};

static __always_inline void sniffer_trace_call(sniffer_trace_handler handler,
					       unsigned long ip, SNIFFER_FTRACE_REGS *regs)
{
	const struct sniffer_args args = { {
		sniffer_ftrace_argument(regs, 0), sniffer_ftrace_argument(regs, 1),
		sniffer_ftrace_argument(regs, 2), sniffer_ftrace_argument(regs, 3),
		sniffer_ftrace_argument(regs, 4),
	}, ip };

	handler(&args);
}

/* A group whose functions are called often: @handler is inlined. */
#define SNIFFER_TRACE_GROUP(name, handler, only_at_times)				\
static void name##_told(unsigned long ip, unsigned long parent, struct ftrace_ops *ops,	\
			SNIFFER_FTRACE_REGS *regs)					\
{											\
	sniffer_trace_call(handler, ip, regs);						\
}											\
static struct sniffer_trace_group name = {						\
	.ops = { .func = name##_told, .flags = SNIFFER_FTRACE_FLAGS },			\
	.lazy = only_at_times,								\
}

void sniffer_trace_register(struct sniffer_trace *functions, unsigned int count);
bool sniffer_trace_start(struct sniffer_trace_group *group, struct sniffer_trace *functions,
			 unsigned int count);
void sniffer_trace_stop(struct sniffer_trace_group *group, struct sniffer_trace *functions,
			unsigned int count);
void sniffer_trace_unregister(struct sniffer_trace *functions, unsigned int count);

#endif /* SNIFFER_TRACE_H */

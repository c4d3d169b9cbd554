/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_TRACE_H
#define SNIFFER_TRACE_H

#include <linux/ftrace.h>
#include <linux/kprobes.h>
#include <linux/types.h>

#include "compat.h"

/* How far ftrace's call may be from the address that we know. */
#define SNIFFER_TRACE_OFF	15

/* The first arguments of a traced function. */
struct sniffer_args {
	unsigned long n[5];
	unsigned long ip;	/* where it was called from ftrace: near the function's address */
};

typedef void (*sniffer_trace_handler)(const struct sniffer_args *args);

/**
 * struct sniffer_trace_group - functions that share one ftrace_ops
 * @ops: its function calls the handler that they share
 * @lazy: attached only between sniffer_trace_start() and sniffer_trace_stop()
 * @registered: attached now
 *
 * Set at load. Later only starting and stopping write @registered, one at a time.
 */
struct sniffer_trace_group {
	struct ftrace_ops ops;
	bool lazy;
	bool registered;
};

/**
 * struct sniffer_trace - a kernel function and our handler of its calls
 * @symbol: its name
 * @handler: our function; preemption or interrupts may be off
 * @bit: enum sniffer_probe; 0 if names are right without it
 * @ways: ways to remove a descriptor that it covers
 * @group: its group, for functions that are called often; else NULL
 * @ip: its address; 0: not known
 * @ops: its own ftrace_ops, if @ip is not known
 * @kprobe: used while @probed
 * @traced: attached by ftrace
 * @probed: attached by a kprobe
 *
 * Set at load, by one thread, before the first handler runs.
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

/* A group of functions that are called often: @handler is inlined. */
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

/* Was it the function at @ip that was called? Ftrace's address may be a few bytes off. */
static __always_inline bool sniffer_trace_is_at(const struct sniffer_args *args, unsigned long ip)
{
	return args->ip - ip + SNIFFER_TRACE_OFF <= 2 * SNIFFER_TRACE_OFF;
}

void sniffer_trace_find(struct sniffer_trace *functions, unsigned int count);
void sniffer_trace_register(struct sniffer_trace *functions, unsigned int count);
bool sniffer_trace_start(struct sniffer_trace_group *group, struct sniffer_trace *functions,
			 unsigned int count);
void sniffer_trace_stop(struct sniffer_trace_group *group, struct sniffer_trace *functions,
			unsigned int count);
void sniffer_trace_unregister(struct sniffer_trace *functions, unsigned int count);

#endif /* SNIFFER_TRACE_H */

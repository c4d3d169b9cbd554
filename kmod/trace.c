// SPDX-License-Identifier: GPL-2.0-only
/*
 * Calls our handlers when a kernel function is called: by ftrace, else by a kprobe.
 *
 * Ftrace never misses a call. A kprobe is the fallback where ftrace refuses. A kprobe
 * is skipped while its CPU runs any kprobe's handler, and debugfs kprobes/enabled can
 * switch kprobes off without notice.
 *
 * For each ftrace_ops the kernel walks through all of its functions, and waits for all
 * CPUs. So most of our functions share one ftrace_ops, which finds the handler by
 * address.
 */
#include <linux/hash.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/sort.h>

#include "trace.h"

#define TRACE_MAX	32	/* the most functions */
#define TRACE_BITS	6	/* bits of the hash of their addresses */
#define TRACE_ALIGN	16	/* no two functions begin within as many bytes */

static bool kprobes;
module_param(kprobes, bool, 0444);
MODULE_PARM_DESC(kprobes, "use kprobes even where ftrace can be used, for tests (default N)");

/* Functions without a group, sorted by address. Set at load, before the first call. */
static struct sniffer_trace *trace_rare[TRACE_MAX];
static unsigned int trace_rare_count;

/* The same functions by a hash of the address, if it is where ftrace says. */
static struct trace_slot {
	unsigned long key;
	sniffer_trace_handler handler;
} trace_slots[1 << TRACE_BITS];

/* The last function that does not begin after @ip. */
static sniffer_trace_handler trace_search(unsigned long ip)
{
	unsigned int low = 0, high = trace_rare_count, middle;

	while (high - low > 1) {
		middle = (low + high) / 2;
		if (trace_rare[middle]->ip <= ip + SNIFFER_TRACE_OFF)
			low = middle;
		else
			high = middle;
	}
	return trace_rare[low]->handler;
}

static void trace_told_rare(unsigned long ip, unsigned long parent, struct ftrace_ops *ops,
			    SNIFFER_FTRACE_REGS *regs)
{
	const struct trace_slot *slot = &trace_slots[hash_long(ip / TRACE_ALIGN, TRACE_BITS)];

	sniffer_trace_call(likely(slot->key == ip / TRACE_ALIGN) ? slot->handler : trace_search(ip),
			   ip, regs);
}

static struct sniffer_trace_group trace_rare_group = {
	.ops = { .func = trace_told_rare, .flags = SNIFFER_FTRACE_FLAGS },
};

static void trace_told_own(unsigned long ip, unsigned long parent, struct ftrace_ops *ops,
			   SNIFFER_FTRACE_REGS *regs)
{
	sniffer_trace_call(container_of(ops, struct sniffer_trace, ops)->handler, ip, regs);
}

static int trace_probed(struct kprobe *probe, struct pt_regs *regs)
{
	const struct sniffer_args args = { {
		regs_get_kernel_argument(regs, 0), regs_get_kernel_argument(regs, 1),
		regs_get_kernel_argument(regs, 2), regs_get_kernel_argument(regs, 3),
		regs_get_kernel_argument(regs, 4),
	}, (unsigned long)probe->addr };

	container_of(probe, struct sniffer_trace, kprobe)->handler(&args);
	return 0;
}

/**
 * sniffer_trace_find - find the addresses of functions
 * @functions: with @symbol set; sets @ip, and clears @handler of one that does not
 *	exist
 * @count: how many
 *
 * Kprobes look up one name. Ftrace would compare the name of every kernel function.
 */
void sniffer_trace_find(struct sniffer_trace *functions, unsigned int count)
{
	struct kprobe *finders[TRACE_MAX];
	unsigned int i, found = 0;
	int err;

	for (i = 0; i < count; i++) {
		struct kprobe *finder = &functions[i].kprobe;

		finder->symbol_name = functions[i].symbol;
		finder->flags = KPROBE_FLAG_DISABLED;	/* never fires: patches no code */
		err = register_kprobe(finder);
		if (err == -ENOENT)
			functions[i].handler = NULL;
		if (err)
			continue;
		functions[i].ip = (unsigned long)finder->addr;
		finders[found++] = finder;
	}
	/* waits once for all CPUs */
	if (found)
		unregister_kprobes(finders, found);
}

static int trace_compare(const void *a, const void *b)
{
	const struct sniffer_trace *const *left = a, *const *right = b;

	return (*left)->ip < (*right)->ip ? -1 : (*left)->ip > (*right)->ip;
}

/* Ftrace may be switched off (kernel.ftrace_enabled, ftrace_kill()). Then registering fails. */
static bool trace_register_ops(struct ftrace_ops *ops)
{
	if (!register_ftrace_function(ops))
		return true;
	ftrace_set_filter(ops, NULL, 0, 1);
	return false;
}

/* A function whose address kprobes do not know. */
static bool trace_register_own(struct sniffer_trace *function)
{
	char *name = (char *)function->symbol;	/* ftrace only reads it */

	function->ops.func = trace_told_own;
	function->ops.flags = SNIFFER_FTRACE_FLAGS;
	return !ftrace_set_filter(&function->ops, name, strlen(name), 1) &&
	       trace_register_ops(&function->ops);
}

static void trace_register_group(struct sniffer_trace_group *group)
{
	if (!group->registered)
		group->registered = trace_register_ops(&group->ops);
}

static void trace_add_rare(struct sniffer_trace *function)
{
	unsigned long key = function->ip / TRACE_ALIGN;
	struct trace_slot *slot = &trace_slots[hash_long(key, TRACE_BITS)];

	trace_rare[trace_rare_count++] = function;
	/* the second of two equal names is searched for */
	if (!slot->key)
		*slot = (struct trace_slot){ key, function->handler };
}

static void trace_register_kprobe(struct sniffer_trace *function)
{
	memset(&function->kprobe, 0, sizeof(function->kprobe));
	function->kprobe.symbol_name = function->symbol;
	function->kprobe.pre_handler = trace_probed;
	if (function->group && function->group->lazy)
		function->kprobe.flags = KPROBE_FLAG_DISABLED;
	function->probed = !register_kprobe(&function->kprobe);
}

/**
 * sniffer_trace_register - attach handlers to functions
 * @functions: after sniffer_trace_find(); one without a handler is left out
 * @count: how many; 32 at most in all calls together
 *
 * Process context. Sets @traced or @probed of each that is attached.
 */
void sniffer_trace_register(struct sniffer_trace *functions, unsigned int count)
{
	struct sniffer_trace *function;

	for (function = functions; function < functions + count; function++) {
		if (!function->handler || !function->ip || kprobes)
			continue;
		if (!function->group)
			function->group = &trace_rare_group;
		/* ftrace may not know it */
		function->traced = !ftrace_set_filter_ip(&function->group->ops, function->ip, 0, 0);
		if (function->traced && function->group == &trace_rare_group)
			trace_add_rare(function);
	}
	sort(trace_rare, trace_rare_count, sizeof(*trace_rare), trace_compare, NULL);
	for (function = functions; function < functions + count; function++) {
		if (!function->handler)
			continue;
		if (function->traced && function->group->lazy) {
			/*
			 * a lazy group reports a failure only when it is started;
			 * others report it now
			 */
			function->traced = trace_rare_group.registered;
		} else if (function->traced) {
			trace_register_group(function->group);
			function->traced = function->group->registered;
		} else if (!function->ip && !kprobes) {
			function->traced = trace_register_own(function);
		}
		if (!function->traced)
			trace_register_kprobe(function);
	}
}

/**
 * sniffer_trace_start - attach a lazy group
 * @group: the group
 * @functions: as they were registered
 * @count: how many
 *
 * Process context; takes some ms.
 *
 * Return: false if one of them cannot be attached.
 */
bool sniffer_trace_start(struct sniffer_trace_group *group, struct sniffer_trace *functions,
			 unsigned int count)
{
	struct sniffer_trace *function;
	bool told = true;

	for (function = functions; function < functions + count; function++) {
		if (function->group != group)
			continue;
		if (function->traced && !group->registered)
			group->registered = !register_ftrace_function(&group->ops);
		told &= function->probed ? !enable_kprobe(&function->kprobe) :
					   function->traced && group->registered;
	}
	return told;
}

/**
 * sniffer_trace_stop - detach a lazy group
 * @group: the group
 * @functions: as they were registered
 * @count: how many
 *
 * Process context; takes some ms.
 */
void sniffer_trace_stop(struct sniffer_trace_group *group, struct sniffer_trace *functions,
			unsigned int count)
{
	struct sniffer_trace *function;

	if (group->registered)
		unregister_ftrace_function(&group->ops);
	group->registered = false;
	for (function = functions; function < functions + count; function++)
		if (function->group == group && function->probed)
			disable_kprobe(&function->kprobe);
}

/**
 * sniffer_trace_unregister - detach all functions
 * @functions: as they were registered
 * @count: how many
 */
void sniffer_trace_unregister(struct sniffer_trace *functions, unsigned int count)
{
	struct sniffer_trace *function;
	struct ftrace_ops *ops;

	for (function = functions; function < functions + count; function++) {
		if (function->probed)
			unregister_kprobe(&function->kprobe);
		if (!function->traced)
			continue;
		ops = function->ip ? &function->group->ops : &function->ops;
		if (!function->ip || function->group->registered)
			unregister_ftrace_function(ops);
		ftrace_set_filter(ops, NULL, 0, 1);
		if (function->ip)
			function->group->registered = false;
	}
}

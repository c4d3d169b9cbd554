// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tracepoints that feed the owner table: process life, TCP states and resets. Each is
 * optional. Preemption is off.
 */
#include <linux/module.h>
#include <linux/sched/signal.h>
#include <linux/tracepoint.h>
#include <net/sock.h>
#include <net/tcp_states.h>

#include "alive.h"
#include "compat.h"
#include "owner.h"
#include "process.h"
#include "reset.h"
#include "rings.h"
#include "tracepoints.h"
#include "use.h"

static void tracepoints_fork(void *data, struct task_struct *parent, struct task_struct *child)
{
	sniffer_alive_note(SNIFFER_PROBE_FORK);
	sniffer_use_fork(child);
}

static void tracepoints_exec(void *data, struct task_struct *task, pid_t old_pid,
			struct linux_binprm *bprm)
{
	sniffer_alive_note(SNIFFER_PROBE_EXEC);
	sniffer_process_exec(task);
	sniffer_use_rings_end();
}

static void tracepoints_exited(void *data, SNIFFER_EXIT_ARGS)
{
	sniffer_alive_note(SNIFFER_PROBE_EXIT);
	if (atomic_read(&task->signal->live)) {
		sniffer_use_thread_end();
		return;
	}
	sniffer_process_exited(task);
	sniffer_use_end();
}

static void tracepoints_rename(void *data, struct task_struct *task, const char *comm)
{
	sniffer_alive_note(SNIFFER_PROBE_RENAME);
	sniffer_process_rename(task, comm);
}

/*
 * Keeps TCP exact where kprobes are missing: connect and listen change the state in
 * their caller.
 */
static void tracepoints_state(void *data, const struct sock *sk, int oldstate, int newstate)
{
	sniffer_alive_note(SNIFFER_PROBE_STATE);
	if (sk->sk_protocol != IPPROTO_TCP)
		return;
	if (newstate == TCP_FIN_WAIT1 && sniffer_owner_is_kernels(sk))
		sniffer_owner_serve((struct sock *)sk, NULL);
	if (newstate == TCP_CLOSE || oldstate == TCP_CLOSE)
		sniffer_owner_close_state((struct sock *)sk, oldstate, newstate);
	if (in_task() && (newstate == TCP_SYN_SENT || newstate == TCP_LISTEN))
		sniffer_use((struct sock *)sk, true, NULL);
}

/* Fires before the packet leaves, in the same context. */
static void tracepoints_reset(void *data, SNIFFER_RESET_ARGS)
{
	sniffer_alive_note(SNIFFER_PROBE_RESET);
	if (sk && skb && sk_fullsock(sk))
		sniffer_reset_told((struct sock *)sk, skb);
}

/* At the end of io_uring_register(). */
static void tracepoints_ring(void *data, SNIFFER_RING_ARGS)
{
	sniffer_rings_registered(opcode, ret);
}

/* Set at load only. */
struct tracepoints_one {
	const char *name;
	void *handler;
	u32 bit;
	struct tracepoint *tp;
	bool registered;
};

static struct tracepoints_one tracepoints[] = {
	{ "sched_process_fork", tracepoints_fork, SNIFFER_PROBE_FORK },
	{ "sched_process_exec", tracepoints_exec, SNIFFER_PROBE_EXEC },
	{ "sched_process_exit", tracepoints_exited, SNIFFER_PROBE_EXIT },
	{ "task_rename", tracepoints_rename, SNIFFER_PROBE_RENAME },
	{ "inet_sock_set_state", tracepoints_state, SNIFFER_PROBE_STATE },
	{ "tcp_send_reset", tracepoints_reset, SNIFFER_PROBE_RESET },
	{ "io_uring_register", tracepoints_ring, 0 },
};

static void tracepoints_match(struct tracepoint *tp, void *data)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(tracepoints); i++)
		if (!strcmp(tp->name, tracepoints[i].name))
			tracepoints[i].tp = tp;
}

/**
 * sniffer_tracepoints_init - attach to the tracepoints
 * @refuse: enum sniffer_probe of tracepoints to leave out
 *
 * Return: enum sniffer_probe of the tracepoints attached.
 */
u32 sniffer_tracepoints_init(u32 refuse)
{
	u32 registered = 0;
	unsigned int i;

	for_each_kernel_tracepoint(tracepoints_match, NULL);
	for (i = 0; i < ARRAY_SIZE(tracepoints); i++) {
		struct tracepoints_one *p = &tracepoints[i];

		p->registered = p->tp && !(refuse & p->bit) &&
				!tracepoint_probe_register(p->tp, p->handler, NULL);
		if (p->registered)
			registered |= p->bit;
		else if (p->bit)
			pr_notice("sniffer: no tracepoint %s: some owners will be unknown\n",
				  p->name);
	}
	return registered;
}

/* When this returns, no handler runs any more. */
void sniffer_tracepoints_exit(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(tracepoints); i++)
		if (tracepoints[i].registered)
			tracepoint_probe_unregister(tracepoints[i].tp, tracepoints[i].handler,
						    NULL);
	tracepoint_synchronize_unregister();
}

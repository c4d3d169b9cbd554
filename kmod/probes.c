// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the owner table learns from: entry kprobes on the LSM hooks of sockets
 * and files, and tracepoints of process life. Each is optional. Kprobes can
 * register and still never fire (kernel.ftrace_enabled=0, debugfs
 * kprobes/enabled=0): a canary of our own tells.
 *
 * Handlers run with preemption disabled and perhaps interrupts too: no sleep,
 * no GFP_KERNEL, no long walk.
 */
#include <linux/kprobes.h>
#include <linux/magic.h>
#include <linux/module.h>
#include <linux/net.h>
#include <linux/ptrace.h>
#include <linux/tracepoint.h>
#include <linux/workqueue.h>
#include <net/sock.h>
#include <net/tcp_states.h>

#include "compat.h"
#include "hooks.h"
#include "owner.h"
#include "probes.h"
#include "process.h"

static u32 probes_registered;	/* enum sniffer_probe; set at load only */
static u32 probes_firing;	/* enum sniffer_probe; only ever gains bits */
static bool probes_alive;	/* did the last canary sing? */
static unsigned int probes_sung;

static void probes_note(u32 bit)
{
	/* a race can lose a bit until the next time: nobody minds */
	if (unlikely(!(READ_ONCE(probes_firing) & bit)))
		WRITE_ONCE(probes_firing, probes_firing | bit);
}

/* The first argument of most hooks: an inet socket in use by current. */
static void probes_use(struct socket *sock, u32 bit)
{
	struct sock *sk = sock ? READ_ONCE(sock->sk) : NULL;

	probes_note(bit);
	if (sk)
		sniffer_owner_use(sk, true);
}

#define ARG(n) ((void *)regs_get_kernel_argument(regs, n))

static int probes_create(struct kprobe *probe, struct pt_regs *regs)
{
	struct socket *sock = ARG(0);
	bool kern = regs_get_kernel_argument(regs, 4);

	probes_note(SNIFFER_PROBE_CREATE);
	if (!kern && sock->sk)
		sniffer_owner_create(sock->sk, SOCK_INODE(sock)->i_ino);
	return 0;
}

static int probes_bind(struct kprobe *probe, struct pt_regs *regs)
{
	probes_use(ARG(0), SNIFFER_PROBE_BIND);
	return 0;
}

static int probes_connect(struct kprobe *probe, struct pt_regs *regs)
{
	probes_use(ARG(0), SNIFFER_PROBE_CONNECT);
	return 0;
}

static int probes_listen(struct kprobe *probe, struct pt_regs *regs)
{
	probes_use(ARG(0), SNIFFER_PROBE_LISTEN);
	return 0;
}

static int probes_accept(struct kprobe *probe, struct pt_regs *regs)
{
	probes_use(ARG(0), SNIFFER_PROBE_ACCEPT);
	return 0;
}

static int probes_sendmsg(struct kprobe *probe, struct pt_regs *regs)
{
	probes_use(ARG(0), SNIFFER_PROBE_SENDMSG);
	return 0;
}

static int probes_recvmsg(struct kprobe *probe, struct pt_regs *regs)
{
	probes_use(ARG(0), SNIFFER_PROBE_RECVMSG);
	return 0;
}

/* accept() ties the new sock to its socket; callback lock held, BH off. */
static int probes_graft(struct kprobe *probe, struct pt_regs *regs)
{
	struct sock *sk = ARG(0);
	struct socket *parent = ARG(1);

	probes_note(SNIFFER_PROBE_GRAFT);
	if (parent && SOCK_INODE(parent))
		sniffer_owner_create(sk, SOCK_INODE(parent)->i_ino);
	return 0;
}

static int probes_receive(struct kprobe *probe, struct pt_regs *regs)
{
	struct file *file = ARG(0);
	struct inode *inode = file_inode(file);
	struct sock *sk;

	probes_note(SNIFFER_PROBE_RECEIVE);
	if (inode->i_sb->s_magic != SOCKFS_MAGIC)
		return 0;
	sk = READ_ONCE(SOCKET_I(inode)->sk);
	if (sk)
		sniffer_owner_receive(sk);
	return 0;
}

static int probes_free(struct kprobe *probe, struct pt_regs *regs)
{
	probes_note(SNIFFER_PROBE_FREE);
	sniffer_owner_free(ARG(0));
	return 0;
}

/* Every close(), dup2() over, exec and exit comes by here: leave at once if not ours. */
static int probes_close(struct kprobe *probe, struct pt_regs *regs)
{
	struct file *file = ARG(0);

	if (likely(file_inode(file)->i_sb->s_magic != SOCKFS_MAGIC))
		return 0;
	probes_note(SNIFFER_PROBE_CLOSE);
	sniffer_owner_close(file);
	return 0;
}

static noinline void probes_canary(void)
{
	barrier();
}

static int probes_sing(struct kprobe *probe, struct pt_regs *regs)
{
	WRITE_ONCE(probes_sung, probes_sung + 1);
	return 0;
}

static struct kprobe probes_canary_probe = {
	.addr = (kprobe_opcode_t *)probes_canary,
	.pre_handler = probes_sing,
};

struct probes_kprobe {
	struct kprobe probe;
	u32 bit;
};

#define PROBES_KPROBE(symbol, handler, what)						\
	{ .probe = { .symbol_name = symbol, .pre_handler = handler }, .bit = what }

static struct probes_kprobe probes_kprobes[] = {
	PROBES_KPROBE("security_socket_post_create", probes_create, SNIFFER_PROBE_CREATE),
	PROBES_KPROBE("security_socket_bind", probes_bind, SNIFFER_PROBE_BIND),
	PROBES_KPROBE("security_socket_connect", probes_connect, SNIFFER_PROBE_CONNECT),
	PROBES_KPROBE("security_socket_listen", probes_listen, SNIFFER_PROBE_LISTEN),
	PROBES_KPROBE("security_socket_accept", probes_accept, SNIFFER_PROBE_ACCEPT),
	PROBES_KPROBE("security_sock_graft", probes_graft, SNIFFER_PROBE_GRAFT),
	PROBES_KPROBE("security_socket_sendmsg", probes_sendmsg, SNIFFER_PROBE_SENDMSG),
	PROBES_KPROBE("security_socket_recvmsg", probes_recvmsg, SNIFFER_PROBE_RECVMSG),
	PROBES_KPROBE("security_file_receive", probes_receive, SNIFFER_PROBE_RECEIVE),
	PROBES_KPROBE("security_sk_free", probes_free, SNIFFER_PROBE_FREE),
	PROBES_KPROBE("locks_remove_posix", probes_close, SNIFFER_PROBE_CLOSE),
};

static void probes_fork(void *data, struct task_struct *parent, struct task_struct *child)
{
	probes_note(SNIFFER_PROBE_FORK);
	sniffer_owner_fork(child);
}

static void probes_exec(void *data, struct task_struct *task, pid_t old_pid,
			struct linux_binprm *bprm)
{
	probes_note(SNIFFER_PROBE_EXEC);
	sniffer_process_exec(task);
	sniffer_owner_exec(task);
}

static void probes_exited(void *data, SNIFFER_EXIT_ARGS)
{
	probes_note(SNIFFER_PROBE_EXIT);
	if (atomic_read(&task->signal->live))
		return;
	sniffer_owner_leave(task);
	sniffer_process_exited(task);
}

static void probes_rename(void *data, struct task_struct *task, const char *comm)
{
	probes_note(SNIFFER_PROBE_RENAME);
	sniffer_process_rename(task, comm);
}

/* Keeps TCP exact where kprobes are missing: connect and listen run in their caller. */
static void probes_state(void *data, const struct sock *sk, int oldstate, int newstate)
{
	probes_note(SNIFFER_PROBE_STATE);
	if (sk->sk_protocol != IPPROTO_TCP)
		return;
	if (newstate == TCP_CLOSE && !sniffer_probes_alive())
		sniffer_owner_free((struct sock *)sk);
	else if (in_task() && (newstate == TCP_SYN_SENT || newstate == TCP_LISTEN))
		sniffer_owner_use((struct sock *)sk, true);
}

/* Fires before the packet leaves, in the same context. */
static void probes_reset(void *data, SNIFFER_RESET_ARGS)
{
	probes_note(SNIFFER_PROBE_RESET);
	if (sk && skb && sk_fullsock(sk))
		sniffer_hooks_reset((struct sock *)sk, skb);
}

struct probes_tracepoint {
	const char *name;
	void *handler;
	u32 bit;
	struct tracepoint *tp;
};

static struct probes_tracepoint probes_tracepoints[] = {
	{ "sched_process_fork", probes_fork, SNIFFER_PROBE_FORK },
	{ "sched_process_exec", probes_exec, SNIFFER_PROBE_EXEC },
	{ "sched_process_exit", probes_exited, SNIFFER_PROBE_EXIT },
	{ "task_rename", probes_rename, SNIFFER_PROBE_RENAME },
	{ "inet_sock_set_state", probes_state, SNIFFER_PROBE_STATE },
	{ "tcp_send_reset", probes_reset, SNIFFER_PROBE_RESET },
};

static void probes_match_tracepoint(struct tracepoint *tp, void *data)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(probes_tracepoints); i++)
		if (!strcmp(tp->name, probes_tracepoints[i].name))
			probes_tracepoints[i].tp = tp;
}

static void probes_self_test(void)
{
	unsigned int before = READ_ONCE(probes_sung);
	bool alive, was = probes_alive;

	probes_canary();
	alive = READ_ONCE(probes_sung) != before;
	if (alive != was) {
		WRITE_ONCE(probes_alive, alive);
		if (!alive)
			pr_warn("sniffer: kprobes stopped firing: check kernel.ftrace_enabled and debugfs kprobes/enabled\n");
	}
}

static void probes_tick(struct work_struct *work);
static DECLARE_DELAYED_WORK(probes_ticker, probes_tick);

static void probes_tick(struct work_struct *work)
{
	probes_self_test();
	schedule_delayed_work(&probes_ticker, HZ);
}

/**
 * sniffer_probes_alive - do kprobes fire, and are those registered that name UDP?
 */
bool sniffer_probes_alive(void)
{
	return READ_ONCE(probes_alive) && probes_registered & SNIFFER_PROBE_CREATE;
}

/**
 * sniffer_probes_registered - enum sniffer_probe of all that could be registered
 */
u32 sniffer_probes_registered(void)
{
	return probes_registered;
}

/**
 * sniffer_probes_firing - enum sniffer_probe of all that fired since load
 */
u32 sniffer_probes_firing(void)
{
	return READ_ONCE(probes_firing);
}

int sniffer_probes_init(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(probes_kprobes); i++)
		if (!register_kprobe(&probes_kprobes[i].probe))
			probes_registered |= probes_kprobes[i].bit;
		else
			pr_notice("sniffer: no kprobe on %s: some owners will be unknown\n",
				  probes_kprobes[i].probe.symbol_name);

	for_each_kernel_tracepoint(probes_match_tracepoint, NULL);
	for (i = 0; i < ARRAY_SIZE(probes_tracepoints); i++) {
		struct probes_tracepoint *p = &probes_tracepoints[i];

		if (p->tp && !tracepoint_probe_register(p->tp, p->handler, NULL))
			probes_registered |= p->bit;
		else
			pr_notice("sniffer: no tracepoint %s: some owners will be unknown\n",
				  p->name);
	}

	if (register_kprobe(&probes_canary_probe))
		probes_canary_probe.addr = NULL;
	probes_self_test();
	if (!probes_alive)
		pr_warn("sniffer: kprobes do not fire: UDP receivers and shared sockets will be unknown\n");
	schedule_delayed_work(&probes_ticker, HZ);

	sniffer_owner_seed();
	return 0;
}

void sniffer_probes_exit(void)
{
	unsigned int i;

	cancel_delayed_work_sync(&probes_ticker);
	if (probes_canary_probe.addr)
		unregister_kprobe(&probes_canary_probe);
	for (i = 0; i < ARRAY_SIZE(probes_tracepoints); i++)
		if (probes_registered & probes_tracepoints[i].bit)
			tracepoint_probe_unregister(probes_tracepoints[i].tp,
						    probes_tracepoints[i].handler, NULL);
	for (i = 0; i < ARRAY_SIZE(probes_kprobes); i++)
		if (probes_registered & probes_kprobes[i].bit)
			unregister_kprobe(&probes_kprobes[i].probe);
	tracepoint_synchronize_unregister();
}

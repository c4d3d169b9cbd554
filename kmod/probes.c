// SPDX-License-Identifier: GPL-2.0-only
/*
 * Probes of kernel functions that feed the owner table: LSM hooks of sockets, and
 * functions that install and remove descriptors. Each is optional. trace.c attaches
 * them.
 *
 * If a needed probe is a kprobe, a canary of our own checks every second whether
 * kprobes fire. Calls that kprobes miss are counted.
 *
 * Handlers may run with preemption or interrupts off: no sleep, no GFP_KERNEL.
 */
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/net.h>
#include <linux/tcp.h>
#include <linux/ptrace.h>
#include <linux/workqueue.h>
#include <linux/sched/task_stack.h>
#include <asm/syscall.h>
#include <net/sock.h>

#include "alive.h"
#include "compat.h"
#include "holders.h"
#include "known.h"
#include "owner.h"
#include "probes.h"
#include "process.h"
#include "rings.h"
#include "seed.h"
#include "trace.h"
#include "tracepoints.h"
#include "use.h"

/* Without one of these, ownership would never end or begin too late, and names could be wrong. */
#define PROBES_NEEDED	(SNIFFER_PROBE_CREATE | SNIFFER_PROBE_RECEIVE | SNIFFER_PROBE_FREE | \
			 SNIFFER_PROBE_CLOSE | SNIFFER_PROBE_RELEASE | SNIFFER_PROBE_FORK | \
			 SNIFFER_PROBE_EXEC | SNIFFER_PROBE_EXIT)

static unsigned int refuse;
module_param(refuse, uint, 0444);
MODULE_PARM_DESC(refuse, "enum sniffer_probe of probes not to use, for tests (default 0)");

/* Value of /sys/module/sniffer/parameters/missed. */
static int probes_get_missed(char *buffer, const struct kernel_param *param)
{
	return sprintf(buffer, "%llu\n", sniffer_probes_missed());
}

static const struct kernel_param_ops probes_missed_ops = { .get = probes_get_missed };
module_param_cb(missed, &probes_missed_ops, NULL, 0444);
MODULE_PARM_DESC(missed, "read: calls that kprobes missed; ftrace misses none");

/* Set at load only, but for the last one, which the canary's handler alone writes. */
static u32 probes_registered;	/* enum sniffer_probe */
static u32 probes_ways;		/* PROBES_WAY_... that are probed */
static bool probes_by_kprobe;	/* is a needed probe a kprobe? */
static unsigned int probes_sung;

/* For most hooks: the first argument is an inet socket that current uses. */
static void probes_use(const struct sniffer_args *args, u32 bit)
{
	struct socket *sock = (void *)args->n[0];
	struct sock *sk = sock ? READ_ONCE(sock->sk) : NULL;

	sniffer_alive_note(bit);
	if (sk)
		sniffer_use(sk, true, NULL);
}

static __always_inline void probes_create(const struct sniffer_args *args)
{
	struct socket *sock = (void *)args->n[0];
	bool kern = (int)args->n[4];

	sniffer_alive_note(SNIFFER_PROBE_CREATE);
	if (!kern && sock->sk)
		sniffer_use_create(sock->sk, sock);
}

static void probes_bind(const struct sniffer_args *args)
{
	probes_use(args, SNIFFER_PROBE_BIND);
}

static void probes_connect(const struct sniffer_args *args)
{
	probes_use(args, SNIFFER_PROBE_CONNECT);
}

static void probes_listen(const struct sniffer_args *args)
{
	probes_use(args, SNIFFER_PROBE_LISTEN);
}

static void probes_accept(const struct sniffer_args *args)
{
	probes_use(args, SNIFFER_PROBE_ACCEPT);
}

static void (*probes_joined)(void);	/* listen.c's function; set at load and unload only */
static unsigned long probes_send_ip;	/* address of security_socket_sendmsg(); set at load only */

/* Send and receive calls. They have a group of their own, because they are frequent. */
static __always_inline void probes_message(const struct sniffer_args *args)
{
	const u32 both = SNIFFER_PROBE_SENDMSG | SNIFFER_PROBE_RECVMSG;
	struct socket *sock = (void *)args->n[0];
	struct sock *sk = READ_ONCE(sock->sk);

	if (unlikely((READ_ONCE(sniffer_alive_fired) & both) != both))
		sniffer_alive_note(sniffer_trace_is_at(args, probes_send_ip) ? SNIFFER_PROBE_SENDMSG :
									  SNIFFER_PROBE_RECVMSG);
	if (sk && !sniffer_known(sk))
		sniffer_use(sk, true, NULL);
}

/* accept() attaches a new sock to its socket. The callback lock is held, BH off. */
static void probes_graft(const struct sniffer_args *args)
{
	struct sock *sk = (void *)args->n[0];
	struct socket *parent = (void *)args->n[1];

	sniffer_alive_note(SNIFFER_PROBE_GRAFT);
	if (parent)
		sniffer_use_create(sk, parent);
}

/* __receive_sock(): the descriptor is installed by now, so nothing can fail any more. */
static void probes_receive(const struct sniffer_args *args)
{
	struct file *file = (void *)args->n[0];
	struct sock *sk = sniffer_owner_sock(file);

	sniffer_alive_note(SNIFFER_PROBE_RECEIVE);
	if (sk)
		sniffer_use_receive(sk, file);
}

static __always_inline void probes_free(const struct sniffer_args *args)
{
	sniffer_alive_note(SNIFFER_PROBE_FREE);
	sniffer_owner_free((void *)args->n[0]);
}

/* A socket's last file is released. */
static __always_inline void probes_release(const struct sniffer_args *args)
{
	struct sock *sk = ((struct socket *)args->n[0])->sk;

	sniffer_alive_note(SNIFFER_PROBE_RELEASE);
	if (sk)
		sniffer_owner_release(sk);
}

/* Addresses of the two functions; set at load only. */
static unsigned long probes_free_ip, probes_release_ip;

/* A socket is created, released or freed. One group, because many programs do little else. */
static __always_inline void probes_socket(const struct sniffer_args *args)
{
	if (sniffer_trace_is_at(args, probes_free_ip))
		probes_free(args);
	else if (sniffer_trace_is_at(args, probes_release_ip))
		probes_release(args);
	else
		probes_create(args);
}

/*
 * A descriptor is removed: by close(), by dup2() onto it, by close_range() or by
 * io_uring. tracepoints.c follows exec and exit.
 */
static __always_inline void probes_close(const struct sniffer_args *args)
{
	sniffer_alive_note(SNIFFER_PROBE_CLOSE);
	if (!sniffer_use_is_plain(args->n[0]))
		sniffer_use_close(args->n[0]);
}

static void probes_close_locked(const struct sniffer_args *args)
{
	sniffer_alive_note(SNIFFER_PROBE_CLOSE);
	if ((void *)args->n[0] == current->files)
		sniffer_use_close(args->n[1]);
}

static void probes_dup2(const struct sniffer_args *args)
{
	sniffer_alive_note(SNIFFER_PROBE_CLOSE);
	if ((void *)args->n[0] == current->files)
		sniffer_use_close(args->n[2]);
}

static void probes_close_range(const struct sniffer_args *args)
{
	sniffer_alive_note(SNIFFER_PROBE_CLOSE);
	sniffer_use_close_range(args->n[0], args->n[1]);
}

static void probes_close_range_call(const struct sniffer_args *args)
{
	unsigned long n[6];

	sniffer_alive_note(SNIFFER_PROBE_CLOSE);
	syscall_get_arguments(current, task_pt_regs(current), n);
	sniffer_use_close_range(n[0], n[1]);
}

/* Fallback if one of these functions cannot be probed: every removal, also each file at an exit. */
static void probes_close_file(const struct sniffer_args *args)
{
	sniffer_alive_note(SNIFFER_PROBE_CLOSE);
	sniffer_use_close_file((void *)args->n[0], -1);
}

/* Functions that move data without a message: no LSM hook is called. */
static void probes_splice(const struct sniffer_args *args)
{
	struct sock *sk = sniffer_owner_sock((void *)args->n[0]);

	if (sk)
		sniffer_use(sk, true, NULL);
}

/* The kernel maps or copies data for the caller: no message is received. */
static void probes_getsockopt(const struct sniffer_args *args)
{
	struct sock *sk = READ_ONCE(((struct socket *)args->n[0])->sk);

	if ((int)args->n[1] == IPPROTO_TCP && (int)args->n[2] == TCP_ZEROCOPY_RECEIVE && sk)
		sniffer_use(sk, true, NULL);
}

static void probes_sendpage(const struct sniffer_args *args)
{
	probes_use(args, SNIFFER_PROBE_SENDMSG);
}

/* An io_uring operation removes a file from the ring. */
static void probes_ring(const struct sniffer_args *args)
{
	sniffer_rings_forget();
}

static void probes_credentials(const struct sniffer_args *args)
{
	sniffer_process_credentials((void *)args->n[0]);
}

/* A process is about to join a group of some Generic Netlink family. */
static void probes_join(const struct sniffer_args *args)
{
	void (*joined)(void) = READ_ONCE(probes_joined);

	if (joined)
		joined();
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

/* Ways to remove a descriptor. One function of each way has to be probed. */
enum {
	PROBES_WAY_CLOSE	= 1 << 0,
	PROBES_WAY_DUP		= 1 << 1,
	PROBES_WAY_RANGE	= 1 << 2,
	PROBES_WAY_RING		= 1 << 3,
	PROBES_WAYS_ALL		= (1 << 4) - 1,
};

SNIFFER_TRACE_GROUP(probes_messages, probes_message, true);
SNIFFER_TRACE_GROUP(probes_sockets, probes_socket, false);
SNIFFER_TRACE_GROUP(probes_closes, probes_close, false);
SNIFFER_TRACE_GROUP(probes_files, probes_close_file, false);

#define PROBES_FUNCTION(name, function, what, how)	\
	{ .symbol = name, .handler = function, .bit = what, .ways = how }

#define PROBES_GROUPED(name, function, what, how, by)	\
	{ .symbol = name, .handler = function, .bit = what, .ways = how, .group = by }

static struct sniffer_trace probes_functions[] = {
	PROBES_GROUPED("security_socket_post_create", probes_create, SNIFFER_PROBE_CREATE, 0,
		       &probes_sockets),
	PROBES_FUNCTION("security_socket_bind", probes_bind, SNIFFER_PROBE_BIND, 0),
	PROBES_FUNCTION("security_socket_connect", probes_connect, SNIFFER_PROBE_CONNECT, 0),
	PROBES_FUNCTION("security_socket_listen", probes_listen, SNIFFER_PROBE_LISTEN, 0),
	PROBES_FUNCTION("security_socket_accept", probes_accept, SNIFFER_PROBE_ACCEPT, 0),
	PROBES_FUNCTION("security_sock_graft", probes_graft, SNIFFER_PROBE_GRAFT, 0),
	PROBES_GROUPED("security_socket_sendmsg", probes_message, SNIFFER_PROBE_SENDMSG, 0,
		       &probes_messages),
	PROBES_GROUPED("security_socket_recvmsg", probes_message, SNIFFER_PROBE_RECVMSG, 0,
		       &probes_messages),
	PROBES_FUNCTION("__receive_sock", probes_receive, SNIFFER_PROBE_RECEIVE, 0),
	PROBES_GROUPED("inet_release", probes_release, SNIFFER_PROBE_RELEASE, 0, &probes_sockets),
	PROBES_GROUPED("security_sk_free", probes_free, SNIFFER_PROBE_FREE, 0, &probes_sockets),
	/* some kernels lack one or another of these */
	PROBES_GROUPED("close_fd", probes_close, SNIFFER_PROBE_CLOSE, PROBES_WAY_CLOSE,
		       &probes_closes),
	PROBES_GROUPED("file_close_fd", probes_close, SNIFFER_PROBE_CLOSE, PROBES_WAY_CLOSE,
		       &probes_closes),
	PROBES_GROUPED("__close_fd_get_file", probes_close, SNIFFER_PROBE_CLOSE, PROBES_WAY_RING,
		       &probes_closes),
	PROBES_FUNCTION("file_close_fd_locked", probes_close_locked, SNIFFER_PROBE_CLOSE,
			PROBES_WAY_RING),
	PROBES_FUNCTION("do_dup2", probes_dup2, SNIFFER_PROBE_CLOSE, PROBES_WAY_DUP),
	PROBES_FUNCTION("__close_range", probes_close_range, SNIFFER_PROBE_CLOSE,
			PROBES_WAY_RANGE),
	PROBES_FUNCTION(SNIFFER_SYSCALL("close_range"), probes_close_range_call,
			SNIFFER_PROBE_CLOSE, PROBES_WAY_RANGE),
	PROBES_FUNCTION("sock_splice_read", probes_splice, 0, 0),
	PROBES_FUNCTION("inet_sendpage", probes_sendpage, 0, 0),
	PROBES_FUNCTION("security_socket_getsockopt", probes_getsockopt, 0, 0),
	PROBES_FUNCTION("io_fixed_fd_remove", probes_ring, 0, 0),
	PROBES_FUNCTION("io_files_update", probes_ring, 0, 0),
	PROBES_FUNCTION("io_rsrc_node_switch", probes_ring, 0, 0),
	PROBES_FUNCTION("commit_creds", probes_credentials, 0, 0),
	PROBES_FUNCTION("genl_bind", probes_join, 0, 0),
};

static struct sniffer_trace probes_all_closes =
	PROBES_GROUPED("locks_remove_posix", probes_close_file, SNIFFER_PROBE_CLOSE,
		       PROBES_WAYS_ALL, &probes_files);

static void probes_note_ip(const struct sniffer_trace *function)
{
	if (function->handler == probes_message && function->bit == SNIFFER_PROBE_SENDMSG)
		probes_send_ip = function->ip;
	if (function->bit == SNIFFER_PROBE_FREE)
		probes_free_ip = function->ip;
	if (function->bit == SNIFFER_PROBE_RELEASE)
		probes_release_ip = function->ip;
}

static void probes_count(const struct sniffer_trace *function)
{
	if (!function->traced && !function->probed)
		return;
	probes_ways |= function->ways;
	if (!function->ways || probes_ways == PROBES_WAYS_ALL)
		probes_registered |= function->bit;
	if (function->probed && function->bit & PROBES_NEEDED)
		probes_by_kprobe = true;
	if (function->traced && function->bit == SNIFFER_PROBE_RELEASE)
		sniffer_alive_release = true;
}

static void probes_register(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(probes_functions); i++)
		if (refuse & probes_functions[i].bit)
			probes_functions[i].handler = NULL;
	sniffer_trace_find(probes_functions, ARRAY_SIZE(probes_functions));
	/* before the first handler runs */
	for (i = 0; i < ARRAY_SIZE(probes_functions); i++)
		probes_note_ip(&probes_functions[i]);
	sniffer_trace_register(probes_functions, ARRAY_SIZE(probes_functions));
	for (i = 0; i < ARRAY_SIZE(probes_functions); i++)
		probes_count(&probes_functions[i]);
	if (probes_ways != PROBES_WAYS_ALL && !(refuse & SNIFFER_PROBE_CLOSE)) {
		sniffer_trace_find(&probes_all_closes, 1);
		sniffer_trace_register(&probes_all_closes, 1);
		probes_count(&probes_all_closes);
	}
	for (i = 0; i < ARRAY_SIZE(probes_functions); i++)
		if (probes_functions[i].bit & ~probes_registered)
			pr_notice("sniffer: no probe on %s: some owners will be unknown\n",
				  probes_functions[i].symbol);
}

static void probes_self_test(void)
{
	bool alive = (probes_registered & PROBES_NEEDED) == PROBES_NEEDED;
	unsigned int before = READ_ONCE(probes_sung);

	if (alive && probes_by_kprobe) {
		probes_canary();
		alive = READ_ONCE(probes_sung) != before;
		if (!alive && sniffer_alive_names)
			pr_warn("sniffer: kprobes stopped firing: check kernel.ftrace_enabled and debugfs kprobes/enabled\n");
	}
	WRITE_ONCE(sniffer_alive_names, alive);
}

static void probes_tick(struct work_struct *work);
/* Runs only if a needed probe is a kprobe. */
static DECLARE_DEFERRABLE_WORK(probes_ticker, probes_tick);

static void probes_tick(struct work_struct *work)
{
	probes_self_test();
	schedule_delayed_work(&probes_ticker, HZ);
}

/**
 * sniffer_probes_registered - which probes are registered, as enum sniffer_probe
 */
u32 sniffer_probes_registered(void)
{
	return probes_registered;
}

/**
 * sniffer_probes_firing - which probes have fired since load, as enum sniffer_probe
 */
u32 sniffer_probes_firing(void)
{
	return READ_ONCE(sniffer_alive_fired);
}

/**
 * sniffer_probes_missed - how many calls kprobes have missed since load; ftrace misses
 * none
 */
u64 sniffer_probes_missed(void)
{
	u64 missed = 0;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(probes_functions); i++)
		if (probes_functions[i].probed)
			missed += probes_functions[i].kprobe.nmissed;
	return missed;
}

/**
 * sniffer_probes_tell_messages - arm or disarm the probes of send and receive
 * @on: arm them
 *
 * Process context, one at a time; takes some ms.
 *
 * Return: false if one of them cannot be armed.
 */
bool sniffer_probes_tell_messages(bool on)
{
	if (on)
		return sniffer_trace_start(&probes_messages, probes_functions,
					   ARRAY_SIZE(probes_functions));
	sniffer_trace_stop(&probes_messages, probes_functions, ARRAY_SIZE(probes_functions));
	return false;
}

/**
 * sniffer_probes_tell_joins - set the function to call when a process may join a group
 * @joined: called before the join, in any context; must not sleep
 */
void sniffer_probes_tell_joins(void (*joined)(void))
{
	WRITE_ONCE(probes_joined, joined);
}

int sniffer_probes_init(void)
{
	probes_register();
	probes_registered |= sniffer_tracepoints_init(refuse);

	if (!probes_by_kprobe || register_kprobe(&probes_canary_probe))
		probes_canary_probe.addr = NULL;
	probes_self_test();
	if (!sniffer_alive_names)
		pr_warn("sniffer: a probe does not fire: UDP receivers and shared sockets will be unknown\n");
	if (probes_by_kprobe)
		schedule_delayed_work(&probes_ticker, HZ);

	/* after the probes, so that a socket that they missed is found here */
	sniffer_seed();
	return 0;
}

void sniffer_probes_exit(void)
{
	/* file releases are not seen from now on: first nobody may use a socket's file */
	WRITE_ONCE(sniffer_alive_release, false);
	synchronize_rcu();
	cancel_delayed_work_sync(&probes_ticker);
	if (probes_canary_probe.addr)
		unregister_kprobe(&probes_canary_probe);
	sniffer_trace_unregister(probes_functions, ARRAY_SIZE(probes_functions));
	sniffer_trace_unregister(&probes_all_closes, 1);
	sniffer_tracepoints_exit();
	sniffer_holders_exit();
}

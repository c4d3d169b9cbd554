// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the owner table learns from: the LSM hooks of sockets and files, by
 * ftrace, and tracepoints of process life. Each is optional.
 *
 * Ftrace calls us each time, whatever runs on the CPU. A kprobe is left out
 * while its CPU is in any kprobe's handler, and can be switched off behind our
 * back (debugfs kprobes/enabled): it is the fallback where ftrace refuses,
 * what it left out is counted, and a canary of our own tells whether it fires.
 *
 * Handlers may run with preemption or interrupts off: no sleep, no GFP_KERNEL.
 */
#include <linux/ftrace.h>
#include <linux/kprobes.h>
#include <linux/magic.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/net.h>
#include <linux/ptrace.h>
#include <linux/tracepoint.h>
#include <linux/workqueue.h>
#include <asm/syscall.h>
#include <net/sock.h>
#include <net/tcp_states.h>

#include "compat.h"
#include "hooks.h"
#include "owner.h"
#include "probes.h"
#include "process.h"

/* Without one of these holds would never end, or begin too late: names could be wrong. */
#define PROBES_NEEDED	(SNIFFER_PROBE_CREATE | SNIFFER_PROBE_RECEIVE | SNIFFER_PROBE_FREE | \
			 SNIFFER_PROBE_CLOSE | SNIFFER_PROBE_RELEASE | SNIFFER_PROBE_FORK | \
			 SNIFFER_PROBE_EXEC | SNIFFER_PROBE_EXIT)

static unsigned int refuse;
module_param(refuse, uint, 0444);
MODULE_PARM_DESC(refuse, "enum sniffer_probe of those not to use, for tests (default 0)");

static bool kprobes;
module_param(kprobes, bool, 0444);
MODULE_PARM_DESC(kprobes, "use kprobes even where ftrace can be used, for tests (default N)");

/* /sys/module/sniffer/parameters/missed */
static int probes_get_missed(char *buffer, const struct kernel_param *param)
{
	return sprintf(buffer, "%llu\n", sniffer_probes_missed());
}

static const struct kernel_param_ops probes_missed_ops = { .get = probes_get_missed };
module_param_cb(missed, &probes_missed_ops, NULL, 0444);
MODULE_PARM_DESC(missed, "read: events that kprobes left out; ftrace leaves out none");

static u32 probes_registered;	/* enum sniffer_probe; set at load only */
static u32 probes_firing;	/* enum sniffer_probe; only ever gains bits */
static bool probes_alive;	/* do the needed ones fire? by the last canary, if by kprobes */
static bool probes_by_kprobe;	/* is one of the needed ones a kprobe? set at load only */
static unsigned int probes_sung;
static u32 probes_ways;		/* PROBES_WAY_...; set at load only */
static bool probes_release_told; /* without fail; set at load only */

static void probes_note(u32 bit)
{
	/* a race can lose a bit until the next time: nobody minds */
	if (unlikely(!(READ_ONCE(probes_firing) & bit)))
		WRITE_ONCE(probes_firing, probes_firing | bit);
}

/* The first arguments of a probed function; inlined away. */
struct probes_args {
	unsigned long n[5];
};

/* The first argument of most hooks: an inet socket in use by current. */
static __always_inline void probes_use(const struct probes_args *args, u32 bit)
{
	struct socket *sock = (void *)args->n[0];
	struct sock *sk = sock ? READ_ONCE(sock->sk) : NULL;

	probes_note(bit);
	if (sk)
		sniffer_use(sk, true);
}

static __always_inline void probes_create(const struct probes_args *args)
{
	struct socket *sock = (void *)args->n[0];
	bool kern = (int)args->n[4];

	probes_note(SNIFFER_PROBE_CREATE);
	if (!kern && sock->sk)
		sniffer_use_create(sock->sk, SOCK_INODE(sock)->i_ino, NULL);
}

static __always_inline void probes_bind(const struct probes_args *args)
{
	probes_use(args, SNIFFER_PROBE_BIND);
}

static __always_inline void probes_connect(const struct probes_args *args)
{
	probes_use(args, SNIFFER_PROBE_CONNECT);
}

static __always_inline void probes_listen(const struct probes_args *args)
{
	probes_use(args, SNIFFER_PROBE_LISTEN);
}

static __always_inline void probes_accept(const struct probes_args *args)
{
	probes_use(args, SNIFFER_PROBE_ACCEPT);
}

static __always_inline void probes_sendmsg(const struct probes_args *args)
{
	probes_use(args, SNIFFER_PROBE_SENDMSG);
}

static __always_inline void probes_recvmsg(const struct probes_args *args)
{
	probes_use(args, SNIFFER_PROBE_RECVMSG);
}

/* accept() ties the new sock to its socket; callback lock held, BH off. */
static __always_inline void probes_graft(const struct probes_args *args)
{
	struct sock *sk = (void *)args->n[0];
	struct socket *parent = (void *)args->n[1];

	probes_note(SNIFFER_PROBE_GRAFT);
	if (parent && SOCK_INODE(parent))
		sniffer_use_create(sk, SOCK_INODE(parent)->i_ino, READ_ONCE(parent->file));
}

/* __receive_sock(): the descriptor is installed by now, whatever could have failed. */
static __always_inline void probes_receive(const struct probes_args *args)
{
	struct file *file = (void *)args->n[0];
	struct sock *sk = sniffer_use_sock(file);

	probes_note(SNIFFER_PROBE_RECEIVE);
	if (sk)
		sniffer_use_receive(sk, file);
}

static __always_inline void probes_free(const struct probes_args *args)
{
	probes_note(SNIFFER_PROBE_FREE);
	sniffer_owner_free((void *)args->n[0]);
}

/* The last file of a socket goes. */
static __always_inline void probes_release(const struct probes_args *args)
{
	struct sock *sk = ((struct socket *)args->n[0])->sk;

	probes_note(SNIFFER_PROBE_RELEASE);
	if (sk)
		sniffer_owner_release(sk);
}

/*
 * How descriptors go: close(), dup2() over one, close_range() and io_uring. An
 * exec and an exit are told as such.
 */
static __always_inline void probes_close(const struct probes_args *args)
{
	probes_note(SNIFFER_PROBE_CLOSE);
	sniffer_use_close(args->n[0]);
}

static __always_inline void probes_close_locked(const struct probes_args *args)
{
	probes_note(SNIFFER_PROBE_CLOSE);
	if ((void *)args->n[0] == current->files)
		sniffer_use_close(args->n[1]);
}

static __always_inline void probes_dup2(const struct probes_args *args)
{
	probes_note(SNIFFER_PROBE_CLOSE);
	if ((void *)args->n[0] == current->files)
		sniffer_use_close(args->n[2]);
}

static __always_inline void probes_close_range(const struct probes_args *args)
{
	probes_note(SNIFFER_PROBE_CLOSE);
	sniffer_use_close_range(args->n[0], args->n[1]);
}

static __always_inline void probes_close_range_call(const struct probes_args *args)
{
	unsigned long n[6];

	probes_note(SNIFFER_PROBE_CLOSE);
	syscall_get_arguments(current, task_pt_regs(current), n);
	sniffer_use_close_range(n[0], n[1]);
}

/* All of these, and each file at an exit: where one of them cannot be probed. */
static __always_inline void probes_close_file(const struct probes_args *args)
{
	probes_note(SNIFFER_PROBE_CLOSE);
	sniffer_use_close_file((void *)args->n[0], -1);
}

/* What moves data without a message: no LSM hook is asked. */
static __always_inline void probes_splice(const struct probes_args *args)
{
	struct sock *sk = sniffer_use_sock((void *)args->n[0]);

	if (sk)
		sniffer_use(sk, true);
}

static __always_inline void probes_sendpage(const struct probes_args *args)
{
	probes_use(args, SNIFFER_PROBE_SENDMSG);
}

static __always_inline void probes_credentials(const struct probes_args *args)
{
	sniffer_process_credentials((void *)args->n[0]);
}

/* The two ways into one handler. */
#define PROBES_WAYS(handler)								\
static void handler##_traced(unsigned long ip, unsigned long parent, struct ftrace_ops *ops, \
			     SNIFFER_FTRACE_REGS *regs)					\
{											\
	const struct probes_args args = { {						\
		sniffer_ftrace_argument(regs, 0), sniffer_ftrace_argument(regs, 1),	\
		sniffer_ftrace_argument(regs, 2), sniffer_ftrace_argument(regs, 3),	\
		sniffer_ftrace_argument(regs, 4),					\
	} };										\
											\
	handler(&args);									\
}											\
static int handler##_probed(struct kprobe *probe, struct pt_regs *regs)		\
{											\
	const struct probes_args args = { {						\
		regs_get_kernel_argument(regs, 0), regs_get_kernel_argument(regs, 1),	\
		regs_get_kernel_argument(regs, 2), regs_get_kernel_argument(regs, 3),	\
		regs_get_kernel_argument(regs, 4),					\
	} };										\
											\
	handler(&args);									\
	return 0;									\
}

PROBES_WAYS(probes_create)
PROBES_WAYS(probes_bind)
PROBES_WAYS(probes_connect)
PROBES_WAYS(probes_listen)
PROBES_WAYS(probes_accept)
PROBES_WAYS(probes_graft)
PROBES_WAYS(probes_sendmsg)
PROBES_WAYS(probes_recvmsg)
PROBES_WAYS(probes_receive)
PROBES_WAYS(probes_free)
PROBES_WAYS(probes_release)
PROBES_WAYS(probes_close)
PROBES_WAYS(probes_close_locked)
PROBES_WAYS(probes_dup2)
PROBES_WAYS(probes_close_range)
PROBES_WAYS(probes_close_range_call)
PROBES_WAYS(probes_close_file)
PROBES_WAYS(probes_splice)
PROBES_WAYS(probes_sendpage)
PROBES_WAYS(probes_credentials)

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

/**
 * struct probes_function - a function of the kernel that we are told of
 * @symbol: its name
 * @bit: enum sniffer_probe, 0 when names are right without it
 * @ways: of descriptors to go, that it tells of
 * @ops: used while @traced
 * @kprobe: used while @probed
 * @traced: registered with ftrace
 * @probed: registered as a kprobe
 */
struct probes_function {
	const char *symbol;
	u32 bit;
	u32 ways;
	struct ftrace_ops ops;
	struct kprobe kprobe;
	bool traced;
	bool probed;
};

/* Ways of descriptors to go: one function of each has to be told. */
enum {
	PROBES_WAY_CLOSE	= 1 << 0,
	PROBES_WAY_DUP		= 1 << 1,
	PROBES_WAY_RANGE	= 1 << 2,
	PROBES_WAY_RING		= 1 << 3,
	PROBES_WAYS_ALL		= (1 << 4) - 1,
};

#define PROBES_FUNCTION(name, handler, what, how)					\
	{ .symbol = name, .bit = what, .ways = how,					\
	  .ops = { .func = handler##_traced, .flags = SNIFFER_FTRACE_FLAGS },		\
	  .kprobe = { .symbol_name = name, .pre_handler = handler##_probed } }

static struct probes_function probes_functions[] = {
	PROBES_FUNCTION("security_socket_post_create", probes_create, SNIFFER_PROBE_CREATE, 0),
	PROBES_FUNCTION("security_socket_bind", probes_bind, SNIFFER_PROBE_BIND, 0),
	PROBES_FUNCTION("security_socket_connect", probes_connect, SNIFFER_PROBE_CONNECT, 0),
	PROBES_FUNCTION("security_socket_listen", probes_listen, SNIFFER_PROBE_LISTEN, 0),
	PROBES_FUNCTION("security_socket_accept", probes_accept, SNIFFER_PROBE_ACCEPT, 0),
	PROBES_FUNCTION("security_sock_graft", probes_graft, SNIFFER_PROBE_GRAFT, 0),
	PROBES_FUNCTION("security_socket_sendmsg", probes_sendmsg, SNIFFER_PROBE_SENDMSG, 0),
	PROBES_FUNCTION("security_socket_recvmsg", probes_recvmsg, SNIFFER_PROBE_RECVMSG, 0),
	PROBES_FUNCTION("__receive_sock", probes_receive, SNIFFER_PROBE_RECEIVE, 0),
	PROBES_FUNCTION("inet_release", probes_release, SNIFFER_PROBE_RELEASE, 0),
	PROBES_FUNCTION("security_sk_free", probes_free, SNIFFER_PROBE_FREE, 0),
	/* not in every kernel */
	PROBES_FUNCTION("close_fd", probes_close, SNIFFER_PROBE_CLOSE, PROBES_WAY_CLOSE),
	PROBES_FUNCTION("file_close_fd", probes_close, SNIFFER_PROBE_CLOSE, PROBES_WAY_CLOSE),
	PROBES_FUNCTION("__close_fd_get_file", probes_close, SNIFFER_PROBE_CLOSE, PROBES_WAY_RING),
	PROBES_FUNCTION("file_close_fd_locked", probes_close_locked, SNIFFER_PROBE_CLOSE,
			PROBES_WAY_RING),
	PROBES_FUNCTION("do_dup2", probes_dup2, SNIFFER_PROBE_CLOSE, PROBES_WAY_DUP),
	PROBES_FUNCTION("__close_range", probes_close_range, SNIFFER_PROBE_CLOSE,
			PROBES_WAY_RANGE),
	PROBES_FUNCTION(SNIFFER_SYSCALL("close_range"), probes_close_range_call,
			SNIFFER_PROBE_CLOSE, PROBES_WAY_RANGE),
	PROBES_FUNCTION("sock_splice_read", probes_splice, 0, 0),
	PROBES_FUNCTION("inet_sendpage", probes_sendpage, 0, 0),
	PROBES_FUNCTION("commit_creds", probes_credentials, 0, 0),
};

static struct probes_function probes_all_closes =
	PROBES_FUNCTION("locks_remove_posix", probes_close_file, SNIFFER_PROBE_CLOSE,
			PROBES_WAYS_ALL);

/*
 * Where a function is that ftrace can call us from: kprobes look names up, which
 * ftrace would do for each function of the kernel.
 */
static unsigned long probes_find(struct probes_function *function)
{
	struct kprobe finder = { .symbol_name = function->symbol };
	unsigned long found;

	if (register_kprobe(&finder))
		return 0;
	found = (unsigned long)finder.addr;
	unregister_kprobe(&finder);
	return found;
}

/* Ftrace may lack the function, or be switched off (kernel.ftrace_enabled, ftrace_kill()). */
static bool probes_trace(struct probes_function *function)
{
	char *name = (char *)function->symbol;	/* only read */
	unsigned long ip;

	if (kprobes)
		return false;
	ip = probes_find(function);
	if (ip ? ftrace_set_filter_ip(&function->ops, ip, 0, 1) :
		 ftrace_set_filter(&function->ops, name, strlen(name), 1))
		return false;
	if (!register_ftrace_function(&function->ops))
		return true;
	ftrace_set_filter(&function->ops, NULL, 0, 1);
	return false;
}

static void probes_register(struct probes_function *function)
{
	if (refuse & function->bit)
		return;
	function->traced = probes_trace(function);
	if (!function->traced)
		function->probed = !register_kprobe(&function->kprobe);
	if (function->traced || function->probed) {
		probes_ways |= function->ways;
		if (!function->ways || probes_ways == PROBES_WAYS_ALL)
			probes_registered |= function->bit;
	}
	if (function->probed && function->bit & PROBES_NEEDED)
		probes_by_kprobe = true;
}

static void probes_unregister(struct probes_function *function)
{
	if (function->traced) {
		unregister_ftrace_function(&function->ops);
		ftrace_set_filter(&function->ops, NULL, 0, 1);
	} else if (function->probed) {
		unregister_kprobe(&function->kprobe);
	}
}
static void probes_fork(void *data, struct task_struct *parent, struct task_struct *child)
{
	probes_note(SNIFFER_PROBE_FORK);
	sniffer_use_fork(child);
}

static void probes_exec(void *data, struct task_struct *task, pid_t old_pid,
			struct linux_binprm *bprm)
{
	probes_note(SNIFFER_PROBE_EXEC);
	sniffer_process_exec(task);
	sniffer_use_exec();
}

static void probes_exited(void *data, SNIFFER_EXIT_ARGS)
{
	probes_note(SNIFFER_PROBE_EXIT);
	if (atomic_read(&task->signal->live)) {
		sniffer_use_thread_end();
		return;
	}
	sniffer_process_exited(task);
	sniffer_use_end();
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
	if (newstate == TCP_CLOSE || oldstate == TCP_CLOSE)
		sniffer_owner_close_state((struct sock *)sk, oldstate, newstate);
	if (in_task() && (newstate == TCP_SYN_SENT || newstate == TCP_LISTEN))
		sniffer_use((struct sock *)sk, true);
}

/* Fires before the packet leaves, in the same context. */
static void probes_reset(void *data, SNIFFER_RESET_ARGS)
{
	probes_note(SNIFFER_PROBE_RESET);
	if (sk && skb && sk_fullsock(sk))
		sniffer_hooks_reset((struct sock *)sk, skb);
}

/* After io_uring_register(), which may have taken files out of a ring. */
static void probes_ring(void *data, SNIFFER_RING_ARGS)
{
	sniffer_use_ring();
}

struct probes_tracepoint {
	const char *name;
	void *handler;
	u32 bit;
	struct tracepoint *tp;
	bool registered;
};

static struct probes_tracepoint probes_tracepoints[] = {
	{ "sched_process_fork", probes_fork, SNIFFER_PROBE_FORK },
	{ "sched_process_exec", probes_exec, SNIFFER_PROBE_EXEC },
	{ "sched_process_exit", probes_exited, SNIFFER_PROBE_EXIT },
	{ "task_rename", probes_rename, SNIFFER_PROBE_RENAME },
	{ "inet_sock_set_state", probes_state, SNIFFER_PROBE_STATE },
	{ "tcp_send_reset", probes_reset, SNIFFER_PROBE_RESET },
	{ "io_uring_register", probes_ring, 0 },
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
	bool alive = (probes_registered & PROBES_NEEDED) == PROBES_NEEDED;
	unsigned int before = READ_ONCE(probes_sung);

	if (alive && probes_by_kprobe) {
		probes_canary();
		alive = READ_ONCE(probes_sung) != before;
		if (!alive && READ_ONCE(probes_alive))
			pr_warn("sniffer: kprobes stopped firing: check kernel.ftrace_enabled and debugfs kprobes/enabled\n");
	}
	WRITE_ONCE(probes_alive, alive);
}

static void probes_tick(struct work_struct *work);
/* Runs only where a needed probe is a kprobe. */
static DECLARE_DEFERRABLE_WORK(probes_ticker, probes_tick);

static void probes_tick(struct work_struct *work)
{
	probes_self_test();
	schedule_delayed_work(&probes_ticker, HZ);
}

/**
 * sniffer_probes_alive - do all those fire that the owner table needs to be right?
 */
bool sniffer_probes_alive(void)
{
	return READ_ONCE(probes_alive);
}

/**
 * sniffer_probes_tell_release - is the end of each socket's file told without fail?
 *
 * Else nobody may remember its address.
 */
bool sniffer_probes_tell_release(void)
{
	return probes_release_told;
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

/**
 * sniffer_probes_missed - events that kprobes left out since load; ftrace leaves out none
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

int sniffer_probes_init(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(probes_functions); i++)
		probes_register(&probes_functions[i]);
	if (probes_ways != PROBES_WAYS_ALL)
		probes_register(&probes_all_closes);
	for (i = 0; i < ARRAY_SIZE(probes_functions); i++) {
		u32 bit = probes_functions[i].bit;

		if (!(probes_registered & bit) && bit)
			pr_notice("sniffer: no probe on %s: some owners will be unknown\n",
				  probes_functions[i].symbol);
		if (probes_functions[i].traced && bit == SNIFFER_PROBE_RELEASE)
			probes_release_told = true;
	}

	for_each_kernel_tracepoint(probes_match_tracepoint, NULL);
	for (i = 0; i < ARRAY_SIZE(probes_tracepoints); i++) {
		struct probes_tracepoint *p = &probes_tracepoints[i];

		p->registered = p->tp && !(refuse & p->bit) &&
				!tracepoint_probe_register(p->tp, p->handler, NULL);
		if (p->registered)
			probes_registered |= p->bit;
		else if (p->bit)
			pr_notice("sniffer: no tracepoint %s: some owners will be unknown\n",
				  p->name);
	}

	if (!probes_by_kprobe || register_kprobe(&probes_canary_probe))
		probes_canary_probe.addr = NULL;
	probes_self_test();
	if (!probes_alive)
		pr_warn("sniffer: a probe does not fire: UDP receivers and shared sockets will be unknown\n");
	if (probes_by_kprobe)
		schedule_delayed_work(&probes_ticker, HZ);

	sniffer_holders_seed();
	return 0;
}

void sniffer_probes_exit(void)
{
	unsigned int i;

	cancel_delayed_work_sync(&probes_ticker);
	if (probes_canary_probe.addr)
		unregister_kprobe(&probes_canary_probe);
	for (i = 0; i < ARRAY_SIZE(probes_tracepoints); i++)
		if (probes_tracepoints[i].registered)
			tracepoint_probe_unregister(probes_tracepoints[i].tp,
						    probes_tracepoints[i].handler, NULL);
	for (i = 0; i < ARRAY_SIZE(probes_functions); i++)
		probes_unregister(&probes_functions[i]);
	probes_unregister(&probes_all_closes);
	tracepoint_synchronize_unregister();
	sniffer_holders_exit();
}

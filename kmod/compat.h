/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * All differences between kernels, and nothing else. The HAVE_ macros come from Kbuild,
 * which reads the headers of the target kernel. Version numbers do not help, because
 * stable trees get backports.
 */
#ifndef SNIFFER_COMPAT_H
#define SNIFFER_COMPAT_H

#include <linux/file.h>
#include <linux/fdtable.h>
#include <linux/fs.h>
#include <linux/ftrace.h>
#include <linux/ptrace.h>
#include <linux/sched/signal.h>
#include <net/genetlink.h>
#include <net/inet_hashtables.h>
#include <net/inet6_hashtables.h>
#include <linux/igmp.h>
#include <net/if_inet6.h>
#include <net/inet_sock.h>
#include <net/ipv6.h>
#include <net/udp.h>

/* Joining a group wants CAP_NET_ADMIN; the older flag is ignored where the newer exists. */
#ifdef GENL_MCAST_CAP_NET_ADMIN
#define SNIFFER_GROUP_FLAGS	GENL_MCAST_CAP_NET_ADMIN
#else
#define SNIFFER_GROUP_FLAGS	GENL_UNS_ADMIN_PERM
#endif

/* 5.10 has no start of strict header validation. */
#ifdef HAVE_GENL_RESV_START_OP
#define SNIFFER_RESV_START_OP(op)	.resv_start_op = (op),
#else
#define SNIFFER_RESV_START_OP(op)
#endif

/* Lookups lost their table argument: the netns has the table. */
#ifdef HAVE_LOOKUP_HASHINFO
#define SNIFFER_TCP_TABLE(net)	(net)->ipv4.tcp_death_row.hashinfo,
#else
#define SNIFFER_TCP_TABLE(net)
#endif

#ifdef HAVE_NETNS_UDP_TABLE
#define sniffer_udp_table(net)	((net)->ipv4.udp_table)
#else
#define sniffer_udp_table(net)	(&udp_table)
#endif

#ifdef HAVE_LOOKUP_UDP_TABLE
#define SNIFFER_UDP_TABLE(net)	sniffer_udp_table(net),
#else
#define SNIFFER_UDP_TABLE(net)
#endif

/* sched_process_exit grew an argument. */
#ifdef HAVE_EXIT_GROUP_DEAD
#define SNIFFER_EXIT_ARGS	struct task_struct *task, bool group_dead
#else
#define SNIFFER_EXIT_ARGS	struct task_struct *task
#endif

/* So did tcp_send_reset. */
#ifdef HAVE_RESET_REASON
#define SNIFFER_RESET_ARGS	const struct sock *sk, const struct sk_buff *skb, \
				const enum sk_rst_reason reason
#else
#define SNIFFER_RESET_ARGS	const struct sock *sk, const struct sk_buff *skb
#endif

/* io_uring_register lost one. */
#ifdef HAVE_RING_EVENTFD
#define SNIFFER_RING_ARGS	void *ctx, unsigned int opcode, unsigned int nr_files, \
				unsigned int nr_bufs, bool eventfd, long ret
#else
#define SNIFFER_RING_ARGS	void *ctx, unsigned int opcode, unsigned int nr_files, \
				unsigned int nr_bufs, long ret
#endif

/*
 * The register argument of ftrace handlers, how to read a function's arguments from it,
 * and the flags. PERMANENT: nobody can switch ftrace off while we use it. Before 5.11
 * the flag about recursion had the opposite meaning. Our handlers call no function that
 * they trace.
 */
#ifdef HAVE_FTRACE_REGS
#define SNIFFER_FTRACE_REGS	struct ftrace_regs
#define SNIFFER_FTRACE_OWN	0
#else
#define SNIFFER_FTRACE_REGS	struct pt_regs
#define SNIFFER_FTRACE_OWN	FTRACE_OPS_FL_RECURSION_SAFE
#endif
#ifdef CONFIG_DYNAMIC_FTRACE_WITH_ARGS
#define SNIFFER_FTRACE_FLAGS	(FTRACE_OPS_FL_PERMANENT | SNIFFER_FTRACE_OWN)
#else
#define SNIFFER_FTRACE_FLAGS	(FTRACE_OPS_FL_PERMANENT | SNIFFER_FTRACE_OWN | \
				 FTRACE_OPS_FL_SAVE_REGS)
#endif

static __always_inline unsigned long sniffer_ftrace_argument(SNIFFER_FTRACE_REGS *regs,
							     unsigned int n)
{
#if defined(HAVE_FTRACE_ARGUMENT)
	return ftrace_regs_get_argument(regs, n);
#elif !defined(HAVE_FTRACE_REGS)
	return regs_get_kernel_argument(regs, n);
#elif defined(CONFIG_DYNAMIC_FTRACE_WITH_ARGS)
	return regs_get_kernel_argument(&regs->regs, n);
#else
	return regs_get_kernel_argument(ftrace_get_regs(regs), n);
#endif
}

/* The kernel's name of a system call. */
#if defined(CONFIG_X86_64)
#define SNIFFER_SYSCALL(name)	"__x64_sys_" name
#elif defined(CONFIG_ARM64)
#define SNIFFER_SYSCALL(name)	"__arm64_sys_" name
#else
#define SNIFFER_SYSCALL(name)	"sys_" name
#endif

/*
 * Wait until no task is preempted in a trampoline of ftrace, or in text that its task
 * work calls.
 */
static inline void sniffer_synchronize_tasks(void)
{
#ifdef CONFIG_TASKS_RCU
	synchronize_rcu_tasks();
#endif
	synchronize_rcu();
}

/* Does the task use io_uring, or is it one of its helpers? */
static inline bool sniffer_has_uring(const struct task_struct *task)
{
#ifdef CONFIG_IO_URING
	return task->io_uring || task->flags & PF_IO_WORKER;
#else
	return false;
#endif
}

/* No exported function says whether a file is an io_uring. The caller keeps @file alive. */
static inline bool sniffer_is_uring(const struct file *file)
{
	return !strcmp(file->f_path.dentry->d_name.name, "[io_uring]");
}

static inline struct file *sniffer_exe_file(struct mm_struct *mm)
{
#ifdef HAVE_GET_FILE_RCU_POINTER
	return get_file_rcu(&mm->exe_file);
#else
	struct file *file = rcu_dereference(mm->exe_file);

	return file && get_file_rcu(file) ? file : NULL;
#endif
}

/* IP_MULTICAST_ALL became a flag bit. */
#ifdef HAVE_INET_MC_ALL_BIT
#define sniffer_mc_all4(sk)	inet_test_bit(MC_ALL, sk)
#define sniffer_mc_all6(sk)	inet6_test_bit(MC6_ALL, sk)
#else
#define sniffer_mc_all4(sk)	(inet_sk(sk)->mc_all)
#define sniffer_mc_all6(sk)	(inet6_sk(sk)->mc_all)
#endif

/* IPv6 source filters can be read under RCU only on kernels that free them by RCU. */
static inline bool sniffer_mc_source6(const struct ipv6_mc_socklist *mc,
				      const struct in6_addr *source)
{
#ifdef HAVE_MC6_SOURCES_RCU
	const struct ip6_sf_socklist *sources = rcu_dereference(mc->sflist);
	unsigned int i;

	for (i = 0; sources && i < sources->sl_count; i++)
		if (ipv6_addr_equal(&sources->sl_addr[i], source))
			return mc->sfmode == MCAST_INCLUDE;
	return mc->sfmode == MCAST_EXCLUDE;
#else
	return true;
#endif
}

#endif /* SNIFFER_COMPAT_H */

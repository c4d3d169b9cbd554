/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_KERNEL_H
#define HUNTER_KERNEL_H
/*
 * The kernel's types, as far as the programs read them. They are kept by hand:
 * libbpf moves each access to where the running kernel has the field (CO-RE).
 * So the order and the rest of each structure do not matter here.
 */
#include <linux/types.h>
#include <linux/bpf.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s32 s32;
typedef __s64 s64;
typedef _Bool bool;
enum { false, true };
#ifndef NULL
#define NULL ((void *)0)
#endif

#define AF_INET			2
#define AF_INET6		10
#define AF_PACKET		17
#define IPPROTO_TCP		6
#define IPPROTO_UDP		17
#define IPPROTO_MPTCP		262
#define TCP_ZEROCOPY_RECEIVE	35
#define SOCK_STREAM		1
#define SOCK_RAW		3
#define S_IFMT			0170000
#define S_IFSOCK		0140000
#define PF_IO_WORKER		0x00000010
#define PF_EXITING		0x00000004
#define PF_MEMALLOC		0x00000800
#define PF_KTHREAD		0x00200000
#define IPSKB_FORWARDED		1
#define IP6SKB_FORWARDED	2
#define IPSKB_TRANSFORMED	4	/* IPSKB_XFRM_TRANSFORMED */
#define IP6SKB_TRANSFORMED	1
#define TS_COMPAT		2	/* x86: a call of 32 bits is under way */
#define TIF_32BIT		22	/* arm64: a program of 32 bits */
#define CLOSE_RANGE_UNSHARE	2
#define NF_INET_FORWARD		2
#define NF_ACCEPT		1
#define ROUTE_LOCAL		0x80000000	/* RTCF_LOCAL and RTF_LOCAL */
#define NAT_DONE		(3 << 4)	/* IPS_NAT_MASK */
#define WQ_FLAG_EXCLUSIVE	1
#define STACK_MAX	(64 << 10)	/* THREAD_SIZE at most */
#define SOCK_DEAD_BIT		1	/* 1 << SOCK_DEAD */

enum {
	TCP_ESTABLISHED = 1, TCP_SYN_SENT, TCP_SYN_RECV, TCP_FIN_WAIT1, TCP_FIN_WAIT2,
	TCP_TIME_WAIT, TCP_CLOSE, TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_LISTEN, TCP_CLOSING,
	TCP_NEW_SYN_RECV,
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct { int counter; } atomic_t;
typedef struct { s64 counter; } atomic64_t;

struct list_head { struct list_head *next, *prev; };
struct ns_common { unsigned int inum; };
struct net { struct ns_common ns; };
typedef struct { struct net *net; } possible_net_t;
struct net_device { int ifindex; possible_net_t nd_net; unsigned int priv_flags; };
enum netdev_priv_flags___x { IFF_L3MDEV_MASTER___x = 1 << 18 };
struct dst_entry { struct net_device *dev; };
struct rtable { unsigned int rt_flags; };
struct rt6_info { u32 rt6i_flags; };

/* where a path goes through a mount */
struct vfsmount { struct dentry *mnt_root; };
struct mount { struct mount *mnt_parent; struct dentry *mnt_mountpoint; struct vfsmount mnt; };

struct inode { unsigned long i_ino; u16 i_mode; };
struct qstr { u32 len; const unsigned char *name; };
struct dentry { struct dentry *d_parent; struct qstr d_name; };
struct path { struct vfsmount *mnt; struct dentry *dentry; };
struct fs_struct { struct path root; };
struct file {
	struct inode *f_inode;
	void *private_data;
	struct path f_path;
};
/* what file_count() reads: f_count up to 6.12, f_ref from 6.13 on */
struct file___count { atomic64_t f_count; };
struct file_ref___new { atomic64_t refcnt; };
struct file___ref { struct file_ref___new f_ref; };

struct fdtable { unsigned int max_fds; struct file **fd; };
struct files_struct { atomic_t count; struct fdtable *fdt; };
typedef struct { u32 val; } kuid_t;
struct cred { kuid_t uid; };
struct pid_namespace { struct ns_common ns; };
struct upid { int nr; struct pid_namespace *ns; };
struct pid { unsigned int level; struct upid numbers[1]; };
struct signal_struct {
	atomic_t live;
	int nr_threads;
	struct list_head thread_head;
	struct pid *pids[4];	/* the second is the process's */
};
struct mm_struct { unsigned long arg_start, arg_end; struct file *exe_file; };
/* parent up to 6.14, __parent from 6.15 on */
struct kernfs_node { struct kernfs_node *parent; const char *name; u64 id; };
struct kernfs_node___new { struct kernfs_node *__parent; };
struct cgroup { struct kernfs_node *kn; };
struct css_set { struct cgroup *dfl_cgrp; };
struct nsproxy { struct net *net_ns; };
struct task_struct {
	unsigned int flags;
	int pid;
	int tgid;
	u64 start_boottime;
	struct task_struct *group_leader;
	struct task_struct *real_parent;
	const struct cred *cred;
	struct files_struct *files;
	struct signal_struct *signal;
	struct list_head tasks;
	struct list_head thread_node;
	void *stack;
	char comm[16];
	void *io_uring;
	struct nsproxy *nsproxy;
	struct mm_struct *mm;
	struct fs_struct *fs;
	struct css_set *cgroups;
};
/* where preempt_count is: on arm64 in the task, on x86 from 6.2 to 6.14 in pcpu_hot */
struct thread_info___arm { u64 flags, preempt_count; };
struct task_struct___arm { struct thread_info___arm thread_info; };
struct thread_info___x86 { u32 status; };
struct task_struct___x86 { struct thread_info___x86 thread_info; };
struct pcpu_hot___x { int preempt_count; };

/* the arguments of a system call */
#ifdef __TARGET_ARCH_x86
struct pt_regs { unsigned long di, si, dx, r10, orig_ax; };
#else
struct pt_regs { u64 regs[31]; s32 syscallno; };
#endif

struct sock;
struct in6_addr { u8 octets[16]; };
struct sock_common {
	unsigned short skc_family;
	volatile unsigned char skc_state;
	u16 skc_num;
	u16 skc_dport;
	u32 skc_daddr;
	u32 skc_rcv_saddr;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	possible_net_t skc_net;
	atomic64_t skc_cookie;
	struct sock *skc_listener;
	unsigned long skc_flags;
};
struct wait_queue_entry {
	unsigned int flags;
	void *private;
	struct list_head entry;
};
struct wait_queue_head { struct list_head head; };
struct socket_wq { struct wait_queue_head wait; };
struct socket { struct sock *sk; struct file *file; struct socket_wq wq; };
struct socket_alloc { struct socket socket; struct inode vfs_inode; };
struct sock {
	struct sock_common __sk_common;
	struct socket *sk_socket;
	u16 sk_type;
	u16 sk_protocol;
	u8 sk_kern_sock : 1;
	void *sk_user_data;
	struct dst_entry *sk_dst_cache;
};
struct tcp_sock { bool is_mptcp; };
struct tcp_sock___bit { u8 is_mptcp : 1; };
struct request_sock_queue { struct request_sock *rskq_accept_head; };
struct inet_connection_sock {
	struct request_sock_queue icsk_accept_queue;
	void *icsk_ulp_data;
};
struct mptcp_sock { struct sock *first; };
struct mptcp_subflow_context___x { struct sock *conn; };
struct request_sock {
	struct sock_common __req_common;
	struct request_sock *dl_next;
	struct sock *sk;
};
struct inet_timewait_sock { struct sock_common __tw_common; };

struct sk_buff {
	struct sock *sk;
	struct net_device *dev;
	char cb[48];
	unsigned long _skb_refdst;
	unsigned long _nfct;
	unsigned int len;
	unsigned int data_len;
	int skb_iif;
	u16 protocol;
	u16 transport_header;
	u16 network_header;
	u16 inner_network_header;
	unsigned int end;
	unsigned char *head;
	unsigned char *data;
};
struct nf_conn { unsigned long status; };
enum skb_drop_reason___x {
	SKB_DROP_REASON_NOT_SPECIFIED___x = 2,
	SKB_DROP_REASON_NO_SOCKET___x = 3,
};
struct skb_shared_info { unsigned short gso_size; unsigned short gso_segs; };
struct inet_skb_parm { u16 flags; };
struct inet6_skb_parm { u16 flags; };

struct nf_hook_state { u8 hook; struct net_device *out; struct sock *sk; struct net *net; };
struct bpf_nf_ctx { const struct nf_hook_state *state; struct sk_buff *skb; };

struct seq_file;
struct bpf_map;
struct bpf_iter_meta { struct seq_file *seq; };
struct bpf_iter__task_file {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	u32 fd;
	struct file *file;
};

#pragma clang attribute pop

#ifdef __TARGET_ARCH_x86
#define SYSCALL(name)	"__x64_sys_" #name
#define ARGUMENT1(r)	((r)->di)
#define ARGUMENT2(r)	((r)->si)
#define ARGUMENT3(r)	((r)->dx)
#define ARGUMENT4(r)	((r)->r10)
#define CALL_FIELD	orig_ax
#else
#define SYSCALL(name)	"__arm64_sys_" #name
#define ARGUMENT1(r)	((r)->regs[0])
#define ARGUMENT2(r)	((r)->regs[1])
#define ARGUMENT3(r)	((r)->regs[2])
#define ARGUMENT4(r)	((r)->regs[3])
#define CALL_FIELD	syscallno
#endif
#define CALL_NUMBER(r)	((r)->CALL_FIELD)

#endif /* HUNTER_KERNEL_H */

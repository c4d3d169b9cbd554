/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_CALLS_H
#define HUNTER_CALLS_H
/*
 * What processes do to sockets by system calls. Where trampolines are refused, the two
 * tracepoints of all calls report them. A use and a close are seen before the call, its
 * results after it.
 */
#include "probes.h"

#define SOL_SOCKET	1
#define SCM_RIGHTS	1
#define PASSED_MAX	253	/* SCM_MAX_FD */
#define CMSGS_MAX	8	/* control messages that are looked at */
#define ADDFD		0x40182103	/* SECCOMP_IOCTL_NOTIF_ADDFD */

/* The current process uses this descriptor, if it is a socket. */
__noinline int call_uses(u32 fd)
{
	struct task_struct *current = bpf_get_current_task_btf();
	struct gain g = { .tid = current->pid, .fd = fd };
	struct owner *o;
	u64 cookie;

	g.file = file_of(current, fd);
	cookie = g.file ? file_cookie(g.file) : 0;
	if (!cookie || use_is_plain(cookie, current))
		return 0;
	key_of(current, &g.who);
	o = owner_find(cookie);
	if (o)
		g.ring = o->ring && same(&o->user, &g.who);
	use_gain(cookie, &g, current);
	return 0;
}

/* The call that ends has given this descriptor to the current process. */
__noinline int call_brought(u32 fd, u32 flags)
{
	struct task_struct *current = bpf_get_current_task_btf();
	struct gain g = { .tid = current->pid, .fd = fd, .flags = flags };
	u64 cookie;

	g.file = file_of(current, fd);
	cookie = g.file ? file_cookie(g.file) : 0;
	if (!cookie)
		return 0;
	key_of(current, &g.who);
	if (flags & SNIFFER_F_INHERITED)
		__sync_fetch_and_add(&gains, 1);
	use_gain(cookie, &g, current);
	return 0;
}

/* As the C library defines them. */
struct user_msg {
	u64 name;
	u64 name_length;
	u64 vectors, vectors_length;
	u64 control, control_length;
	u64 flags;
};

struct passed {
	u64 from;
	u32 count;
};

static long passed_step(u32 i, struct passed *p)
{
	s32 fd = -1;

	if (i >= p->count)
		return 1;
	if (!bpf_probe_read_user(&fd, sizeof(fd), (void *)(p->from + (u64)i * 4)) && fd >= 0)
		call_brought(fd, SNIFFER_F_INHERITED);
	return 0;
}

struct message {
	u64 at, left;
};

static long message_step(u32 i, struct message *m)
{
	struct { u64 length; s32 level, type; } head = {};
	struct passed p;

	if (m->left < sizeof(head) || bpf_probe_read_user(&head, sizeof(head), (void *)m->at) ||
	    head.length < sizeof(head) || head.length > m->left)
		return 1;
	if (head.level == SOL_SOCKET && head.type == SCM_RIGHTS) {
		p.from = m->at + sizeof(head);
		p.count = (head.length - sizeof(head)) / 4;
		bpf_loop(PASSED_MAX, passed_step, &p, 0);
	}
	head.length = (head.length + 7) & ~7ULL;
	if (head.length >= m->left)
		return 1;
	m->at += head.length;
	m->left -= head.length;
	return 0;
}

/* Descriptors may have come with a message that was received (SCM_RIGHTS). */
static __always_inline void call_received(u64 user_message)
{
	struct message m = {};

	/* where the control messages are, and how long */
	if (bpf_probe_read_user(&m, sizeof(m), (void *)user_message +
				__builtin_offsetof(struct user_msg, control)))
		return;
	if (m.at && m.left >= 20)
		bpf_loop(CMSGS_MAX, message_step, &m, 0);
}

struct messages {
	u64 from;
	u64 count;
};

static long received_step(u32 i, struct messages *m)
{
	if (i >= m->count)
		return 1;
	call_received(m->from + (u64)i * (sizeof(struct user_msg) + 8));
	return 0;
}

/*
 * A supervisor puts a descriptor into the table of another process, which may be the
 * user from now on.
 */
static __always_inline void call_adds(struct task_struct *current, u64 argument)
{
	struct { u64 id; u32 flags, fd; } add;
	struct owner *o;

	if (bpf_probe_read_user(&add, sizeof(add), (void *)argument))
		return;
	o = owner_find(file_cookie(file_of(current, add.fd)));
	if (o)
		o->blind = 1;
}

static __always_inline void call_unknown(struct task_struct *current)
{
	struct proc *proc;
	struct key who;

	key_of(current, &who);
	proc = bpf_map_lookup_elem(&procs, &who);
	if (proc)
		proc->blind = 1;
}

SEC("tp_btf/sys_enter")
int BPF_PROG(part_enter, struct pt_regs *regs, long id)
{
	struct task_struct *current = bpf_get_current_task_btf();

	if (is_compat(current)) {
		call_unknown(current);
		return 0;
	}
	switch (id & CALL_MASK) {
	case __NR_read:
	case __NR_write:
	case __NR_readv:
	case __NR_writev:
	case __NR_sendto:
	case __NR_recvfrom:
	case __NR_sendmsg:
	case __NR_recvmsg:
	case __NR_sendmmsg:
	case __NR_recvmmsg:
	case __NR_bind:
	case __NR_connect:
	case __NR_listen:
	case __NR_accept:
	case __NR_accept4:
	case __NR_sendfile:
		call_uses(ARGUMENT1(regs));
		break;
	case __NR_splice:
		call_uses(ARGUMENT1(regs));
		call_uses(ARGUMENT3(regs));
		break;
	case __NR_getsockopt:	/* see probe_getsockopt() */
		if ((u32)ARGUMENT2(regs) == IPPROTO_TCP &&
		    (u32)ARGUMENT3(regs) == TCP_ZEROCOPY_RECEIVE)
			call_uses(ARGUMENT1(regs));
		break;
	case __NR_close:
		closes_number(ARGUMENT1(regs));
		break;
#ifdef __NR_dup2
	case __NR_dup2:
#endif
	case __NR_dup3:
		if (ARGUMENT1(regs) != ARGUMENT2(regs) && file_of(current, ARGUMENT1(regs)))
			closes_number(ARGUMENT2(regs));
		break;
	case __NR_ioctl:
		if (ARGUMENT2(regs) == ADDFD)
			call_adds(current, ARGUMENT3(regs));
		break;
	}
	return 0;
}

SEC("tp_btf/sys_exit")
int BPF_PROG(part_leave, struct pt_regs *regs, long ret)
{
	struct task_struct *current = bpf_get_current_task_btf();
	struct messages many;
	struct proc *proc;
	struct key who;

	if (is_compat(current))
		return 0;
	switch (CALL_NUMBER(regs) & CALL_MASK) {
	case __NR_socket:
	case __NR_accept:
	case __NR_accept4:
		if (ret >= 0)
			call_brought(ret, 0);
		break;
	case __NR_pidfd_getfd:
		if (ret >= 0)
			call_brought(ret, SNIFFER_F_INHERITED);
		break;
	case __NR_recvmsg:
		if (ret >= 0)
			call_received(ARGUMENT2(regs));
		break;
	case __NR_recvmmsg:
		many.from = ARGUMENT2(regs);
		many.count = ret;
		if (ret > 0)
			bpf_loop(1024, received_step, &many, 0);
		break;
	case __NR_close_range:
	case __NR_unshare:
		if (!ret)
			settle_ours(current);
		break;
	case __NR_setuid:
	case __NR_setreuid:
	case __NR_setresuid:
		key_of(current, &who);
		proc = bpf_map_lookup_elem(&procs, &who);
		if (proc)
			proc->uid = current->cred->uid.val;
		break;
	}
	return 0;
}

/* Uses by an io_uring or in the kernel: they have no system call of their own. */
static __always_inline int call_moved(struct sock *sk)
{
	struct task_struct *current = bpf_get_current_task_btf();
	struct socket *sock;
	u64 cookie, file;

	if (!in_task_only(current) || !wants(sk))
		return 0;
	cookie = sk->__sk_common.skc_cookie.counter;
	if (!cookie || use_is_plain(cookie, current))
		return 0;
	sock = sk->sk_socket;
	file = sock ? address(sock->file) : 0;
	if (file)
		use(cookie, file, 1);
	return 0;
}

SEC("tp_btf/sock_send_length")
int BPF_PROG(part_sent, struct sock *sk) { return call_moved(sk); }
SEC("tp_btf/sock_recv_length")
int BPF_PROG(part_received, struct sock *sk) { return call_moved(sk); }

#endif /* HUNTER_CALLS_H */

/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_PROBES_H
#define HUNTER_PROBES_H
/*
 * Programs that feed the owner table: on LSM hooks of sockets and files, by
 * trampolines, and on tracepoints of process life. User space leaves out those whose
 * function this kernel lacks.
 */
#include "name.h"
#include "rings.h"

/* For most hooks: the first argument is an inet socket that current uses. */
static __always_inline int probe_use(struct socket *sock)
{
	struct task_struct *current = bpf_get_current_task_btf();
	struct sock *sk = sock->sk;
	struct file *file;

	if (!sk || use_is_plain(sk->__sk_common.skc_cookie.counter, current) || !wants(sk))
		return 0;
	file = sock->file;
	/* without a file it is the kernel's own, created in this context (nvmet) */
	if (file)
		use(COOKIE(sk), address(file), 1);
	return 0;
}

#define PROBE_USE(name) \
SEC("fentry/" #name) \
int BPF_PROG(probe_##name, struct socket *sock) { return probe_use(sock); }

PROBE_USE(security_socket_bind)
PROBE_USE(security_socket_connect)
PROBE_USE(security_socket_listen)
PROBE_USE(security_socket_accept)
PROBE_USE(security_socket_sendmsg)
PROBE_USE(security_socket_recvmsg)
/* these move data without a message: no LSM hook is called */
PROBE_USE(inet_sendpage)

/* the kernel maps or copies data for the caller: no message is received */
SEC("fentry/security_socket_getsockopt")
int BPF_PROG(probe_getsockopt, struct socket *sock, int level, int optname)
{
	return level == IPPROTO_TCP && optname == TCP_ZEROCOPY_RECEIVE ? probe_use(sock) : 0;
}

SEC("fentry/sock_splice_read")
int BPF_PROG(probe_splice, struct file *file)
{
	u64 number = address(file);
	u64 cookie = file_cookie(number);

	if (cookie && !use_is_plain(cookie, bpf_get_current_task_btf()))
		use(cookie, number, 1);
	return 0;
}

SEC("fentry/security_socket_post_create")
int BPF_PROG(probe_create, struct socket *sock, int family, int type, int protocol, int kern)
{
	struct sock *sk = sock->sk;

	if (!kern && sk && wants(sk))
		use_take(COOKIE(sk), 0, 0);
	return 0;
}

/* accept() attaches a new sock to its socket. */
SEC("fentry/security_sock_graft")
int BPF_PROG(probe_graft, struct sock *sk, struct socket *parent)
{
	if (sk && parent && wants(sk))
		use_take(COOKIE(sk), address(parent->file), 0);
	return 0;
}

/* The descriptor is installed by now, so nothing can fail any more. */
SEC("fentry/__receive_sock")
int BPF_PROG(probe_receive, struct file *file)
{
	u64 number = address(file);
	u64 cookie = file_cookie(number);

	if (cookie)
		use_take(cookie, number, SNIFFER_F_INHERITED);
	return 0;
}

SEC("fentry/security_sk_free")
int BPF_PROG(probe_free, struct sock *sk)
{
	u64 cookie = sk->__sk_common.skc_cookie.counter;
	struct owner *o;

	if (!cookie || !wants(sk))
		return 0;
	o = owner_find(cookie);
	if (o)
		o->dead = bpf_ktime_get_ns();
	return 0;
}

/* A socket's last file is released. */
SEC("fentry/inet_release")
int BPF_PROG(probe_release, struct socket *sock)
{
	struct sock *sk = sock->sk;
	u64 cookie = sk ? sk->__sk_common.skc_cookie.counter : 0;

	if (cookie)
		owner_release(cookie);
	return 0;
}

/* The address of the file behind a descriptor of current, or 0. */
static __always_inline u64 file_of(struct task_struct *current, u32 fd)
{
	struct files_struct *files = current->files;
	struct fdtable *fdt;
	u64 file = 0;

	if (!files)
		return 0;
	fdt = files->fdt;
	if (fd < fdt->max_fds)
		bpf_probe_read_kernel(&file, sizeof(file), (void *)((u64)fdt->fd + (u64)fd * 8));
	return file;
}

/*
 * A descriptor of current is removed. This matters only if current is the socket's last
 * user, and others still have the socket. closing: see CLOSED.
 */
static __always_inline int closes(struct task_struct *current, u64 file, u32 closing)
{
	struct files_struct *files;
	struct owner *o;
	struct key who;
	u64 leader, cookie;

	if (!file)
		return 0;
	cookie = file_cookie(file);
	if (!cookie) {
		if (!has_uring(current) || !is_uring_at(file))
			return 0;
		key_of(current, &who);
		settle_rings(&who, closing & ~CLOSED);
		return 0;
	}
	o = owner_find(cookie);
	if (!o || !o->held || file_refs(file) < 2)
		return 0;
	key_of(current, &who);
	if (!same(&o->user, &who)) {
		/* has the user this very table, too (clone() with CLONE_FILES)? */
		files = current->files;
		if (!files || files->count.counter < 2)
			return 0;
		leader = process_leader(&o->user);
		if (!leader || BPF_CORE_READ((struct task_struct *)leader, files) != files)
			return 0;
	}
	settle(cookie, closing);
	return 0;
}

/*
 * A descriptor is removed: by close(), by dup2() onto it, by close_range() or by io_uring.
 * Exec and exit have tracepoints: a call for each of their files would be expensive.
 */
static __always_inline int closes_number(u32 fd)
{
	struct task_struct *current = bpf_get_current_task_btf();

	return closes(current, file_of(current, fd), LEAVING(fd));
}

static __always_inline int closes_number_of(struct files_struct *files, u32 fd)
{
	struct task_struct *current = bpf_get_current_task_btf();

	return files == current->files ? closes(current, file_of(current, fd), LEAVING(fd)) : 0;
}

SEC("fentry/close_fd")
int BPF_PROG(probe_close, u32 fd) { return closes_number(fd); }
SEC("fentry/file_close_fd")
int BPF_PROG(probe_close_new, u32 fd) { return closes_number(fd); }
SEC("fentry/__close_fd_get_file")
int BPF_PROG(probe_close_by_ring, u32 fd) { return closes_number(fd); }
SEC("fentry/file_close_fd_locked")
int BPF_PROG(probe_close_locked, struct files_struct *files, u32 fd)
{ return closes_number_of(files, fd); }
SEC("fentry/do_dup2")
int BPF_PROG(probe_dup2, struct files_struct *files, struct file *file, u32 fd)
{ return closes_number_of(files, fd); }

/* Fallback if one of these cannot be probed: every removal, also each file at an exit. */
SEC("fentry/locks_remove_posix")
int BPF_PROG(probe_close_file, struct file *file)
{
	return closes(bpf_get_current_task_btf(), (u64)file, CLOSED);
}

/* Which descriptors is not known. The call may have closed them in a new copy of the table. */
SEC("fexit/" SYSCALL(close_range))
int BPF_PROG(probe_close_range)
{
	settle_ours(bpf_get_current_task_btf());
	return 0;
}

SEC("fentry/commit_creds")
int BPF_PROG(probe_credentials, struct cred *cred)
{
	struct task_struct *current = bpf_get_current_task_btf();
	struct proc *proc;
	struct key who;

	if (current->pid != current->tgid)
		return 0;
	key_of(current, &who);
	proc = bpf_map_lookup_elem(&procs, &who);
	if (proc)
		proc->uid = cred->uid.val;
	return 0;
}

SEC("tp_btf/sched_process_fork")
int BPF_PROG(probe_fork, struct task_struct *parent, struct task_struct *child)
{
	struct task_struct *current = bpf_get_current_task_btf();
	struct proc *proc;
	struct key who;

	if (child->tgid == current->tgid || child->flags & PF_KTHREAD)
		return 0;
	about_child(current, child);
	key_of(current, &who);
	proc = bpf_map_lookup_elem(&procs, &who);
	if (!proc)
		return 0;
	proc->child = (u64)child;
	key_of(child, &proc->child_key);
	proc->forked = bpf_ktime_get_ns();
	return 0;
}

SEC("tp_btf/sched_process_exec")
int BPF_PROG(probe_exec, struct task_struct *task)
{
	struct task_struct *leader = task->group_leader;
	struct proc *proc;
	struct key who;

	about(address(task));
	key_of(task, &who);
	proc = bpf_map_lookup_elem(&procs, &who);
	if (!proc)
		return 0;
	proc->uid = task->cred->uid.val;
	proc->leader = (u64)leader;
	comm_at(proc->comm, leader->comm);
	proc->ring_numbers = 0;	/* a process's rings end with its program */
	tell(&who, SNIFFER_EVENT_EXEC);
	/* close-on-exec descriptors are closed by now, also those of rings */
	settle_rings(&who, 0);
	settle_mine(&who);
	return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(probe_exit, struct task_struct *task)
{
	struct files_struct *files = task->files;
	struct proc *proc;
	struct key who;

	key_of(task, &who);
	if (task->signal->live.counter) {
		/* a thread's own table ends with it */
		if (files && files->count.counter == 1)
			settle_table(files, &who);
		return 0;
	}
	proc = bpf_map_lookup_elem(&procs, &who);
	if (!proc)
		return 0;
	proc->exit = bpf_ktime_get_ns() | 1;
	tell(&who, SNIFFER_EVENT_EXIT);
	settle_rings(&who, 0);
	if (files)
		settle_table(files, &who);
	return 0;
}

SEC("tp_btf/task_rename")
int BPF_PROG(probe_rename, struct task_struct *task, const char *comm)
{
	struct proc *proc;
	struct key who;

	if (task->pid != task->tgid)
		return 0;
	key_of(task, &who);
	proc = bpf_map_lookup_elem(&procs, &who);
	if (proc)
		comm_at(proc->comm, comm);
	return 0;
}

/* A socket whose own FIN led to its last state may leave a TIME_WAIT. */
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(probe_state, struct sock *sk, int oldstate, int newstate)
{
	struct owner *o;

	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	if (newstate == TCP_FIN_WAIT1 && is_kernel(sk))
		owner_kernel(COOKIE(sk));
	if (newstate != TCP_CLOSE && oldstate != TCP_CLOSE)
		return 0;
	o = owner_find(sk->__sk_common.skc_cookie.counter);
	if (!o || o->via)
		return 0;
	o->waits = newstate == TCP_CLOSE && (oldstate == TCP_FIN_WAIT2 ||
					     oldstate == TCP_CLOSING || oldstate == TCP_TIME_WAIT);
	if (newstate != TCP_CLOSE)
		o->dead = 0;
	return 0;
}

/* Enters sockets that are older than the engine. Of several holders the last one is named. */
SEC("iter/task_file")
int seed(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct gain g = { .flags = SNIFFER_F_SEEDED };
	struct socket *sock;
	struct owner *o;
	struct sock *sk;
	u64 cookie;

	if (!task || !file)
		return 0;
	sock = bpf_sock_from_file(file);
	if (!sock)
		return 0;
	sk = sock->sk;
	if (!sk || !wants(sk))
		return 0;
	key_of(task, &g.who);
	g.file = (u64)file;
	g.fd = ctx->fd;
	process_enter(address(task), &g.who);
	cookie = COOKIE(sk);
	owner_gain(cookie, &g);
	o = owner_find(cookie);
	if (o)
		o->netns = sk->__sk_common.skc_net.net->ns.inum;
	if (sk->__sk_common.skc_state == TCP_LISTEN && sk->sk_protocol == IPPROTO_TCP)
		queue_seed(sk, cookie);
#ifdef HUNTER_PARTS
	if (sk->__sk_common.skc_state == TCP_LISTEN)
		bpf_sk_storage_get(&listeners, sk, &cookie, BPF_SK_STORAGE_GET_F_CREATE);
#endif
	return 0;
}

#endif /* HUNTER_PROBES_H */

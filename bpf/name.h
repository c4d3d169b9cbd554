/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_NAME_H
#define HUNTER_NAME_H
/* Which process owns a packet? The hooks' questions to the owner table. */
#include "packet.h"
#include "use.h"

/* Connections that waited to be accepted when the programs came: address -> the listener's cookie */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, u64);
} queued SEC(".maps");

struct queue {
	u64 request;
	u64 listener;
};

static long queue_step(u32 i, struct queue *queue)
{
	struct request_sock *request = (void *)queue->request;
	u64 sk, listener = queue->listener;

	if (!request)
		return 1;
	sk = (u64)BPF_CORE_READ(request, sk);
	bpf_map_update_elem(&queued, &sk, &listener, BPF_ANY);
	queue->request = (u64)BPF_CORE_READ(request, dl_next);
	return 0;
}

static __always_inline void queue_seed(struct sock *sk, u64 cookie)
{
	struct inet_connection_sock *listener = (void *)sk;
	struct queue queue = { .listener = cookie };

	queue.request = (u64)BPF_CORE_READ(listener, icsk_accept_queue.rskq_accept_head);
	bpf_loop(8192, queue_step, &queue, 0);
}

/* What naming needs of a socket. It is read while the socket is at hand. */
struct about {
	u64 address;
	u64 cookie;
	u64 parent;	/* cookie of the MPTCP socket whose subflow it is, or of its listener's */
	u64 listener;	/* cookie of a request's */
	u64 inode;
	u64 file;	/* address of its file */
	u16 family;	/* this and the next five: of a full socket only */
	u16 type;
	u16 protocol;
	u16 port;	/* its own */
	u8 flagged;	/* made by the kernel, it says */
	u8 kernels;	/* is_kernel() */
	u8 attached;	/* to a struct socket, so it may have a file */
	u8 state;
	u8 fresh;	/* it had no cookie: no probe had ever seen it */
	u8 full;	/* neither a request nor a TIME_WAIT */
	u8 servers;	/* the kernel's own, or its server's listener */
	u8 gone;	/* closed, no process has it */
	u8 served;	/* a server in the kernel has set its user data */
	u8 unused[7];
};

/*
 * A socket of the kernel's own: flagged so, or without a file (nvmet and iSCSI create
 * theirs as a process does). MPTCP's subflows look the same, but are not the kernel's.
 * Their type tells them from the stack's control sockets, which are raw.
 */
static __always_inline bool is_kernel(struct sock *sk)
{
	struct socket *sock = sk->sk_socket;

	if (!BPF_CORE_READ_BITFIELD(sk, sk_kern_sock) && (!sock || sock->file))
		return false;
	return !(sk->sk_type == SOCK_STREAM && sk->sk_protocol == IPPROTO_TCP &&
		 BPF_CORE_READ_BITFIELD_PROBED((struct tcp_sock *)sk, is_mptcp));
}

static __always_inline bool is_kernel_at(struct sock *sk)
{
	struct socket *sock = BPF_CORE_READ(sk, sk_socket);

	if (!BPF_CORE_READ_BITFIELD_PROBED(sk, sk_kern_sock) &&
	    (!sock || BPF_CORE_READ(sock, file)))
		return false;
	return !(BPF_CORE_READ(sk, sk_type) == SOCK_STREAM &&
		 BPF_CORE_READ(sk, sk_protocol) == IPPROTO_TCP &&
		 BPF_CORE_READ_BITFIELD_PROBED((struct tcp_sock *)sk, is_mptcp));
}

/*
 * Does a server in the kernel accept from this listener? It is the server's own, or a
 * process has handed it over (knfsd), and may have closed it since. Such a server sets
 * the user data. BPF maps mark theirs with the low bits.
 */
static __always_inline bool is_servers_data(u64 data)
{
	return data && !(data & 7);
}

static __always_inline bool is_servers(struct sock *sk)
{
	return is_kernel(sk) || (sk->__sk_common.skc_state == TCP_LISTEN &&
				 is_servers_data((u64)sk->sk_user_data));
}

/* A request or TIME_WAIT. sk: a typed pointer. */
static __always_inline void about_mini(struct sock_common *common, struct about *a)
{
	struct sock *other;

	a->state = common->skc_state;
	a->cookie = common->skc_cookie.counter;
	a->fresh = !a->cookie;
	if (a->state != TCP_NEW_SYN_RECV)
		return;
	other = BPF_CORE_READ(common, skc_listener);
	if (!other)
		return;
	a->listener = cookie_at(other);
	a->servers = is_kernel_at(other) ||
		     is_servers_data((u64)BPF_CORE_READ(other, sk_user_data));
	other = BPF_CORE_READ(other, sk_socket, sk);
	if (other)
		a->parent = cookie_at(other);
}

/* is_kernel() of what has been read. */
static __always_inline bool about_kernels(struct sock *sk, const struct about *a)
{
	if (!a->flagged && (!a->attached || a->file))
		return false;
	return !(a->type == SOCK_STREAM && a->protocol == IPPROTO_TCP &&
		 BPF_CORE_READ_BITFIELD_PROBED((struct tcp_sock *)sk, is_mptcp));
}

/* wants() of what has been read. */
static __always_inline bool about_wanted(const struct about *a)
{
	return !a->flagged && (a->family == AF_INET || a->family == AF_INET6) &&
	       (a->protocol == IPPROTO_TCP || a->protocol == IPPROTO_UDP ||
		a->protocol == IPPROTO_MPTCP || a->type == SOCK_RAW);
}

/*
 * Any socket. sk: a typed pointer. All is read before the first decision about it: for
 * each load on each way the verifier searches the kernel's types by name.
 */
static __always_inline void about_socket(struct sock *sk, struct about *a)
{
	u8 state = sk->__sk_common.skc_state;
	struct mptcp_subflow_context___x *context;
	struct socket *sock;
	struct sock *other;
	struct file *file;
	u64 data;

	if (state == TCP_TIME_WAIT || state == TCP_NEW_SYN_RECV) {
		about_mini(&sk->__sk_common, a);
		return;
	}
	a->address = address(sk);
	a->state = state;
	a->full = 1;
	a->cookie = sk->__sk_common.skc_cookie.counter;
	a->family = sk->__sk_common.skc_family;
	a->port = sk->__sk_common.skc_num;
	a->type = sk->sk_type;
	a->protocol = sk->sk_protocol;
	a->flagged = BPF_CORE_READ_BITFIELD(sk, sk_kern_sock);
	a->gone = (sk->__sk_common.skc_flags & SOCK_DEAD_BIT) != 0;
	data = (u64)sk->sk_user_data;
	sock = sk->sk_socket;
	if (sock) {
		a->attached = 1;
		other = sock->sk;
		file = sock->file;
		if (file) {
			a->inode = file->f_inode->i_ino;
			a->file = address(file);
		}
		if (other && other != sk)
			a->parent = other->__sk_common.skc_cookie.counter;
	}
	a->fresh = !a->cookie;
	a->served = is_servers_data(data);
	a->kernels = about_kernels(sk, a);
	a->servers = a->kernels || (state == TCP_LISTEN && a->served);
	if (!a->parent && !a->inode && a->type == SOCK_STREAM && a->protocol == IPPROTO_TCP &&
	    bpf_core_type_exists(struct mptcp_subflow_context___x) &&
	    BPF_CORE_READ_BITFIELD_PROBED((struct tcp_sock *)sk, is_mptcp)) {
		context = BPF_CORE_READ((struct inet_connection_sock *)sk, icsk_ulp_data);
		other = context ? BPF_CORE_READ(context, conn) : NULL;
		if (other)
			a->parent = cookie_at(other);
	}
}

/* The kernel itself sends or receives the packet. */
static __always_inline void name_kernel(struct sniffer_record *r)
{
	r->how = SNIFFER_HOW_KERNEL;
	r->flags |= SNIFFER_F_KERNEL;
}

/*
 * In parts: may another process have the socket, though nothing reported it? Perhaps
 * nobody was found to have it: then it is in flight, in a ring, or its holder was not
 * reported. An io_uring changes its files without a system call.
 */
static __always_inline bool is_less_sure(struct owner *o, struct proc *user)
{
	return !user || user->blind || o->blind || o->ring || (!o->held && !o->released && o->file);
}

static __always_inline void name_facts(struct sniffer_record *r, struct owner *o,
				       struct proc *user)
{
	r->creator = o->creator;
	r->flags |= o->flags;
	if (parts && is_less_sure(o, user))
		r->flags |= SNIFFER_F_AMBIGUOUS;
	if (!o->held || !user || user->exit)
		r->flags |= SNIFFER_F_DEAD;
	else if (owner_shared(o, user))
		r->flags |= SNIFFER_F_SHARED | (o->guess ? SNIFFER_F_AMBIGUOUS : 0);
}

/* Names a record after an owner's user, and adds what the table knows of the socket. */
static __always_inline void name_owner(struct sniffer_record *r, struct owner *o, u8 how)
{
	struct key key = o->user;
	struct proc *user = bpf_map_lookup_elem(&procs, &key);

	r->how = how;
	r->tgid = key.tgid;
	r->start_ns = key.start;
	r->tid = o->tid;
	if (user) {
		r->uid = user->uid;
		__builtin_memcpy(r->comm, user->comm, SNIFFER_COMM_LEN);
	}
	name_facts(r, o, user);
}

struct waiters {
	u64 first, last;	/* entries, as the queue's head has them */
	u64 head, pos;
	u64 task;	/* it waits longest */
	u64 at;		/* its entry */
};

/*
 * A receive call has its entry on its stack. Those of epoll and io_uring are elsewhere,
 * those of poll() are not exclusive.
 */
static long waiters_step(u32 i, struct waiters *w)
{
	struct wait_queue_entry *entry;
	struct task_struct *task;
	u64 stack;

	if (!w->pos || w->pos == w->head || w->task)
		return 1;
	entry = (void *)(w->pos - bpf_core_field_offset(struct wait_queue_entry, entry));
	task = BPF_CORE_READ(entry, private);
	stack = (u64)BPF_CORE_READ(task, stack);
	if (BPF_CORE_READ(entry, flags) & WQ_FLAG_EXCLUSIVE && stack &&
	    (u64)entry - stack < STACK_MAX) {
		w->task = (u64)task;
		w->at = w->pos;
	}
	w->pos = (u64)BPF_CORE_READ(entry, entry.next);
	return 0;
}

/*
 * Names a datagram after the process that will be given it, of several who have the
 * socket. The name stays if nobody waits in a call. If several wait by other means, as
 * epoll, the first of them to ask gets it.
 */
__noinline int name_waiter(struct sniffer_record *r, u64 file)
{
	struct waiters w = {};
	struct task_struct *task;

	if (!r)
		return 0;
	w.head = (u64)BPF_CORE_READ((struct file *)file, private_data) +
		 bpf_core_field_offset(struct socket, wq.wait.head);
	bpf_probe_read_kernel(&w, sizeof(w.first) + sizeof(w.last), (void *)w.head);
	w.pos = w.first;
	bpf_loop(64, waiters_step, &w, 0);
	task = (void *)w.task;
	if (task) {
		r->tgid = BPF_CORE_READ(task, tgid);
		r->tid = BPF_CORE_READ(task, pid);
		r->uid = BPF_CORE_READ(task, cred, uid.val);
		task = BPF_CORE_READ(task, group_leader);
		r->start_ns = BPF_CORE_READ(task, start_boottime);
		comm_at(r->comm, task->comm);
		r->flags &= ~SNIFFER_F_AMBIGUOUS;
	}
	/* 6.1 follows a loop once and trusts what it has counted: no counter */
	if (w.task ? w.first != w.at : w.first != w.head && w.first != w.last)
		r->flags |= SNIFFER_F_AMBIGUOUS;
	return 0;
}

/* Names a record after the process that would accept the connection. */
static __always_inline void name_acceptor(struct sniffer_record *r, struct owner *listener)
{
	name_owner(r, listener, SNIFFER_HOW_LISTENER);
	if (r->flags & SNIFFER_F_SHARED)
		r->flags |= SNIFFER_F_AMBIGUOUS;
}

/* Finds an entry with a user: by cookie, else the parent's (MPTCP). */
static __always_inline struct owner *name_find(u64 cookie, u64 parent)
{
	struct owner *o = owner_find(cookie);

	if ((!o || !o->user.tgid) && parent)
		o = owner_find(parent);
	return o && o->user.tgid ? o : NULL;
}

/* Names a record after the owner of a socket, or gives the reason why it cannot. */
__noinline int name(struct sniffer_record *r, struct about *a, u32 how)
{
	struct owner *o, *other;
	u64 via = 0, sk, *listener;

	if (!r || !a)
		return 0;
	o = owner_find(a->cookie);
	if (o) {
		via = o->via;
		if (o->servers && !o->held) {
			name_kernel(r);
			return 0;
		}
	}
	/* a plain connection to an MPTCP listener is a copy of the listener's subflow */
	if (a->servers && !(a->full && a->state != TCP_LISTEN && o)) {
		name_kernel(r);
		return 0;
	}
	r->cookie = a->cookie;
	r->inode = a->inode;
	if (a->state == TCP_NEW_SYN_RECV || a->state == TCP_LISTEN) {
		o = name_find(a->state == TCP_LISTEN ? a->cookie : a->listener, a->parent);
		if (o)
			name_acceptor(r, o);
		else
			r->how = a->state == TCP_LISTEN || a->listener ? SNIFFER_HOW_PREDATES :
									 SNIFFER_HOW_SOCKET_GONE;
		return 0;
	}
	/*
	 * a server in the kernel receives these datagrams, and the process that handed
	 * the socket over has closed it
	 */
	if (o && a->full && a->served && !o->held) {
		name_kernel(r);
		return 0;
	}
	if (o && !via && o->user.tgid) {
		name_owner(r, o, how);
		if (r->proto == IPPROTO_UDP && r->dir == SNIFFER_DIR_IN &&
		    r->flags & SNIFFER_F_SHARED)
			name_waiter(r, o->file);
		return 0;
	}
	if (a->parent) {
		other = owner_find(a->parent);
		if (other && other->user.tgid) {
			owner_refer(a->cookie, a->parent, SNIFFER_HOW_INODE);
			name_owner(r, other, SNIFFER_HOW_INODE);
			return 0;
		}
	}
	other = owner_find(via);
	if (other && other->user.tgid && o) {
		if (o->via_how == SNIFFER_HOW_INODE) {
			name_owner(r, other, SNIFFER_HOW_INODE);
			return 0;
		}
		name_acceptor(r, other);
		/* in parts nothing reports which listener got a closed one's queue */
		if (parts && (!other->held || other->dead))
			r->flags |= SNIFFER_F_AMBIGUOUS;
		return 0;
	}
	sk = a->address;	/* 6.1 takes a key only from the stack */
	listener = a->full && !a->inode ? bpf_map_lookup_elem(&queued, &sk) : NULL;
	other = listener ? owner_find(*listener) : NULL;
	if (other && other->user.tgid) {
		owner_refer(a->cookie, *listener, SNIFFER_HOW_LISTENER);
		name_acceptor(r, other);
		return 0;
	}
	r->how = a->gone || !a->full ? a->fresh ? SNIFFER_HOW_PREDATES : SNIFFER_HOW_SOCKET_GONE :
				       SNIFFER_HOW_PREDATES;
	return 0;
}

#endif /* HUNTER_NAME_H */

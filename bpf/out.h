/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_OUT_H
#define HUNTER_OUT_H
/* Where packets leave: behind LOCAL_OUT and NAT, where they are routed. */
#include "in.h"

static __always_inline bool was_forwarded(struct sk_buff *skb, u8 family)
{
	u32 at = family == AF_INET ? bpf_core_field_offset(struct inet_skb_parm, flags) :
				     bpf_core_field_offset(struct inet6_skb_parm, flags);
	u16 flags = 0;

	bpf_probe_read_kernel(&flags, sizeof(flags), (void *)&skb->cb + at);
	return flags & (family == AF_INET ? IPSKB_FORWARDED : IP6SKB_FORWARDED);
}

/* In parts a packet is met behind the last NAT: its port need not be the socket's. */
static __always_inline bool is_translated(struct sk_buff *skb)
{
	struct nf_conn *connection = (void *)(skb->_nfct & ~7UL);

	return connection && bpf_core_type_exists(struct nf_conn) &&
	       BPF_CORE_READ(connection, status) & NAT_DONE;
}

/* The sender is on the CPU: nobody can know better. */
__noinline int out_context(struct sniffer_record *r, u64 cookie, u64 inode)
{
	struct task_struct *current = bpf_get_current_task_btf();
	struct key key, named;
	struct proc *user;
	struct owner *o;

	if (!r)
		return 0;
	r->how = SNIFFER_HOW_CONTEXT;
	r->cookie = cookie;
	r->inode = inode;
	key_of(current, &key);
	r->tgid = key.tgid;
	r->start_ns = key.start;
	r->tid = current->pid;
	r->uid = current->cred->uid.val;
	o = owner_find(cookie);
	if (o) {
		named = o->user;
		user = bpf_map_lookup_elem(&procs, &named);
		name_facts(r, o, user);
		if (user && same(&named, &key)) {
			__builtin_memcpy(r->comm, user->comm, SNIFFER_COMM_LEN);
			return 0;
		}
	}
	comm_at(r->comm, current->group_leader->comm);
	return 0;
}

static __always_inline void out_named(struct sniffer_record *r, struct net *net,
				      struct sock *given, struct sk_buff *skb)
{
	struct task_struct *current = bpf_get_current_task_btf();
	bool trusted = in_task_only(current) && !(current->flags & PF_KTHREAD);
	struct sock *sk = skb->sk;
	struct about a = {};
	struct socket *sock;
	u16 family, port;
	u64 file;
	u8 state;

	/*
	 * A tunnel leaves the inner sender in skb->sk; the tunnel's own socket
	 * is the other one, if it is given. For IPv6 that may also be the
	 * listener of a SYN cookie, or the socket of a packet that a firewall
	 * answers with a reset.
	 */
	if (!sk || (given && r->proto == IPPROTO_UDP)) {
		trusted &= sk == given;
		sk = given;
		if (sk && r->proto == IPPROTO_TCP) {
			state = sk->__sk_common.skc_state;
			if (state != TCP_TIME_WAIT && state != TCP_NEW_SYN_RECV &&
			    state != TCP_LISTEN && !is_kernel(sk))
				sk = NULL;
		}
	}
	if (!sk) {
		answer(r, 0, skb->skb_iif);
		return;
	}
	about_socket(sk, &a);
	FORGET(a);
	if (a.full && a.servers && is_kernel(sk)) {
		if (sk->sk_type == SOCK_STREAM)
			name(r, &a, SNIFFER_HOW_SOCKET);
		else
			answer(r, 1, 0);
		return;
	}
	/* the kernel's wrapping around a packet, whose sender the socket still is */
	if (r->proto == IPPROTO_UDP && !(parts && is_translated(skb))) {
		family = sk->__sk_common.skc_family;
		port = sk->__sk_common.skc_num;
		if (!a.full || (family != AF_INET && family != AF_INET6) ||
		    (sk->sk_type != SOCK_RAW &&
		     (sk->sk_protocol != IPPROTO_UDP || (port && port != r->sport)))) {
			name_kernel(r);
			return;
		}
	}
	/* ipvlan takes the packet of another namespace on its way through this one */
	if (sk->__sk_common.skc_net.net != net) {
		r->dir = SNIFFER_DIR_FWD;
		r->how = SNIFFER_HOW_FORWARDED;
		return;
	}
	/* a tracepoint's socket may not be given to a helper; it was told of its cookie before */
	if (!parts && !a.cookie)
		a.cookie = bpf_get_socket_cookie(sk);
	if (!trusted || !a.full || a.state == TCP_LISTEN || !wants(sk))
		goto table;
	if (!use_is_plain(a.cookie, current)) {
		sock = sk->sk_socket;
		file = sock ? address(sock->file) : 0;
		if ((sock && !file) || !use(a.cookie, file, 0))
			goto table;
	}
	out_context(r, a.cookie, a.inode);
	return;
table:
	name(r, &a, SNIFFER_HOW_SOCKET);
}

static __always_inline void out(struct net *net, struct sock *given, struct sk_buff *skb)
{
	struct sniffer_record r = {};
	struct shape s;
	u64 dst;

	shape_out(skb, &s);
	if (!parse(&r, &s)) {
		skip();
		return;
	}
	dst = skb->_skb_refdst & ~1ULL;
	r.ifindex = BPF_CORE_READ((struct dst_entry *)dst, dev, ifindex);
	r.netns = net->ns.inum;
	r.dir = SNIFFER_DIR_OUT;
	if (was_forwarded(skb, r.family)) {
		r.dir = SNIFFER_DIR_FWD;
		r.how = SNIFFER_HOW_FORWARDED;
	} else {
		out_named(&r, net, given, skb);
	}
	emit(&r, &s);
}

/*
 * A program that interrupts itself on its processor is left out by the kernel:
 * a softirq sends while a task's packet is looked at. So there are two of each,
 * and the one that finds the packet told already has nothing to do. Tasks and
 * softirqs each have a place for what was told last.
 */
struct told {
	u64 skb[2];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct told);
} tolds SEC(".maps");

static __always_inline int out_once(struct net *net, struct sock *sk, struct sk_buff *skb,
				    bool first)
{
	u32 zero = 0, cpu;
	struct told *told = bpf_map_lookup_elem(&tolds, &zero);
	struct counters *c = counters_here(&cpu);
	u64 *last;

	if (!told || !c)
		return 0;
	/* calls and those of which the first was left out, less those told: both were left out */
	if (first)
		__sync_fetch_and_add(&c->calls, 1);
	last = in_task_only(bpf_get_current_task_btf()) ? &told->skb[0] : &told->skb[1];
	if (*last == (u64)skb) {
		*last = 0;
		return 0;
	}
	__sync_fetch_and_add(&c->told, 1);
	out(net, sk, skb);
	*last = (u64)skb;
	return 0;
}

#define TWICE(function) \
SEC("fentry/" #function) \
int BPF_PROG(out_##function, struct net *net, struct sock *sk, struct sk_buff *skb) \
{ return out_once(net, sk, skb, true); } \
SEC("fentry/" #function) \
int BPF_PROG(again_##function, struct net *net, struct sock *sk, struct sk_buff *skb) \
{ return out_once(net, sk, skb, false); }

#ifndef HUNTER_PARTS
TWICE(ip_output)
TWICE(ip_mc_output)
TWICE(ip6_output)
TWICE(xfrm4_output)
TWICE(xfrm6_output)
#endif

#endif /* HUNTER_OUT_H */

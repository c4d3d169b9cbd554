/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_OUT_H
#define HUNTER_OUT_H
/*
 * Outgoing packets, after LOCAL_OUT and NAT. From 6.4 on a Netfilter link in each
 * network namespace reports them. On older kernels functions that every routed packet
 * passes report them.
 */
#include "in.h"

/* What the stack notes of a packet: IPSKB_... or IP6SKB_... */
static __always_inline u16 flags_of(struct sk_buff *skb, u8 family)
{
	u32 at = family == AF_INET ? bpf_core_field_offset(struct inet_skb_parm, flags) :
				     bpf_core_field_offset(struct inet6_skb_parm, flags);
	u16 flags = 0;

	bpf_probe_read_kernel(&flags, sizeof(flags), (void *)&skb->cb + at);
	return flags;
}

static __always_inline bool was_forwarded(u16 flags, u8 family)
{
	return flags & (family == AF_INET ? IPSKB_FORWARDED : IP6SKB_FORWARDED);
}

/*
 * IPsec sends on what it has made of a packet. IPComp leaves a small packet as it was.
 * UDP from another port than the socket's is wrapped around a packet.
 */
static __always_inline bool is_again(struct sniffer_record *r, struct sk_buff *skb, u16 flags)
{
	struct sock *sk = skb->sk;

	if (!(flags & (r->family == AF_INET ? IPSKB_TRANSFORMED : IP6SKB_TRANSFORMED)))
		return false;
	return r->proto == IPPROTO_TCP || (sk && sk->__sk_common.skc_num == r->sport);
}

/* In parts a packet is seen after the last NAT, which may have changed its port. */
static __always_inline bool is_translated(u64 nfct)
{
	struct nf_conn *connection = (void *)(nfct & ~7UL);

	return connection && bpf_core_type_exists(struct nf_conn) &&
	       BPF_CORE_READ(connection, status) & NAT_DONE;
}

/* The sender itself is on the CPU: the best source there is. */
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

/* The same if the sender used the socket last, as nearly always. Else returns false. */
static __always_inline bool out_plain(struct sniffer_record *r, struct about *a,
				      struct task_struct *current)
{
	struct owner *o = owner_plain(a->cookie, current);

	if (!o)
		return false;
	name_owner(r, o, SNIFFER_HOW_CONTEXT);
	r->cookie = a->cookie;
	r->inode = a->inode;
	r->tid = current->pid;
	r->uid = current->cred->uid.val;
	return true;
}

static __always_inline void out_named(struct sniffer_record *r, struct net *net,
				      struct sock *given, struct sk_buff *skb, bool helper)
{
	struct task_struct *current = bpf_get_current_task_btf();
	bool trusted = in_task_only(current) && !(current->flags & PF_KTHREAD);
	u64 nfct = parts ? skb->_nfct : 0;
	struct sock *sk = skb->sk;
	struct about a = {};
	struct net *its;
	u8 state;

	/*
	 * A tunnel leaves the inner sender in skb->sk. Its own socket is given, if
	 * anywhere. For IPv6 the given socket may also be the listener of a SYN
	 * cookie. Or a firewall answers a packet of the given socket with a reset.
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
	/* a frame that a process made itself; Netfilter sees none of these */
	if (parts && sk->__sk_common.skc_family == AF_PACKET) {
		r->how = SNIFFER_HOW_NO_SOCKET;
		if (trusted)
			out_context(r, 0, 0);
		return;
	}
	its = sk->__sk_common.skc_net.net;
	about_socket(sk, &a);
	if (a.full && a.kernels) {
		if (a.type == SOCK_STREAM)
			name(r, &a, SNIFFER_HOW_SOCKET);
		else
			answer(r, 1, 0);
		return;
	}
	/* the kernel wraps UDP around a packet whose sender the socket still is */
	if (r->proto == IPPROTO_UDP && !(parts && is_translated(nfct))) {
		if (!a.full || (a.family != AF_INET && a.family != AF_INET6) ||
		    (a.type != SOCK_RAW &&
		     (a.protocol != IPPROTO_UDP || (a.port && a.port != r->sport)))) {
			name_kernel(r);
			return;
		}
	}
	/* ipvlan: the packet of another namespace on its way through this one */
	if (its != net) {
		r->dir = SNIFFER_DIR_FWD;
		r->how = SNIFFER_HOW_FORWARDED;
		return;
	}
	/* no helper takes the socket of a tracepoint or of Netfilter; its cookie is there */
	if (helper && !a.cookie)
		a.cookie = bpf_get_socket_cookie(sk);
	if (!trusted || !a.full || a.state == TCP_LISTEN || !about_wanted(&a))
		goto table;
	if (out_plain(r, &a, current))
		return;
	if ((a.attached && !a.file) || !use(a.cookie, a.file, 0))
		goto table;
	out_context(r, a.cookie, a.inode);
	return;
table:
	name(r, &a, SNIFFER_HOW_SOCKET);
}

static __always_inline void out(struct net *net, struct sock *given, struct sk_buff *skb,
				bool helper, bool forwarded)
{
	struct sniffer_record r = {};
	struct shape s;
	u16 flags;
	u64 dst;

	shape_out(skb, &s);
	if (!parse(&r, &s)) {
		skip();
		return;
	}
	flags = flags_of(skb, r.family);
	if (is_again(&r, skb, flags)) {
		skip();
		return;
	}
	dst = skb->_skb_refdst & ~1ULL;
	r.ifindex = BPF_CORE_READ((struct dst_entry *)dst, dev, ifindex);
	r.netns = net->ns.inum;
	r.dir = SNIFFER_DIR_OUT;
	if (forwarded || was_forwarded(flags, r.family)) {
		r.dir = SNIFFER_DIR_FWD;
		r.how = SNIFFER_HOW_FORWARDED;
	} else {
		out_named(&r, net, given, skb, helper);
	}
	emit(&r, &s);
}

#ifndef HUNTER_PARTS
enum {
	LINK_BEGINS	= 1,	/* some packets had passed Netfilter before it began */
	LINK_TELLS	= 2,
};

/* Network namespaces (inode) in which a Netfilter link reports what leaves: LINK_... */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 512);
	__type(key, u32);
	__type(value, u32);
} links SEC(".maps");

static __always_inline u32 link_of(struct net *net)
{
	u32 inode = net->ns.inum, *state;

	if (!bpf_core_type_exists(struct bpf_nf_ctx))
		return 0;
	state = bpf_map_lookup_elem(&links, &inode);
	return state ? *state : 0;
}

/* The last packet that was reported here, by a program on a function and by a link. */
struct told {
	u64 skb;
	u64 linked_skb;
};

/* Places of tasks, by thread: another task may run before the second program. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4096);
	__type(key, u32);
	__type(value, struct told);
} told_by_tasks SEC(".maps");

/* Those of softirqs. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, CPUS);
	__type(key, u32);
	__type(value, struct told);
} told_by_softirqs SEC(".maps");

/*
 * The kernel skips a program that would interrupt itself: a softirq may send while the
 * program handles a task's packet. So there are two of each. The second does nothing if
 * the packet was reported already. A link is never skipped.
 */
static __always_inline struct told *told_here(u32 cpu)
{
	struct task_struct *current = bpf_get_current_task_btf();
	u32 at = current->pid & 4095;

	if (in_task_only(current))
		return bpf_map_lookup_elem(&told_by_tasks, &at);
	return bpf_map_lookup_elem(&told_by_softirqs, &cpu);
}

/* Has a link reported this packet? */
static __always_inline bool out_linked(struct net *net, struct sk_buff *skb, bool first,
				       struct counters *c, struct told *told)
{
	u32 state = link_of(net);

	if (!state || (state == LINK_BEGINS && told->linked_skb != (u64)skb))
		return false;
	if (first)
		__sync_fetch_and_add(&c->linked_calls, 1);
	return true;
}

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u32);
} nobody SEC(".maps");

/*
 * Reports a packet. Each program tail-calls it, so that the verifier reads it only once.
 * From 6.13 on a program may have one stack for each processor, since it does not
 * interrupt itself. This one does: two programs can call it, one task after another.
 * A program with a tail call of its own has no such stack.
 */
SEC("fentry/ip_output")
int BPF_PROG(body_out, struct net *net, struct sock *sk, struct sk_buff *skb)
{
	struct counters *c;
	struct told *told;
	u32 cpu;

	c = counters_here(&cpu);
	told = told_here(cpu);
	if (!c || !told) {
		bpf_tail_call(ctx, &nobody, 0);	/* never */
		return 0;
	}
	__sync_fetch_and_add(&c->told, 1);
	out(net, sk, skb, true, false);
	told->skb = (u64)skb;
	return 0;
}

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__array(values, int(void *));
} bodies SEC(".maps") = { .values = { [0] = (void *)&body_out } };

static __always_inline int out_once(void *ctx, struct net *net, struct sk_buff *skb, bool first)
{
	struct counters *c;
	struct told *told;
	u32 cpu;

	c = counters_here(&cpu);
	told = told_here(cpu);
	if (!c || !told || out_linked(net, skb, first, c, told))
		return 0;
	/* calls + skipped first programs - told: packets for which both were skipped */
	if (first)
		__sync_fetch_and_add(&c->calls, 1);
	if (told->skb == (u64)skb) {
		told->skb = 0;
		return 0;
	}
	bpf_tail_call(ctx, &bodies, 0);
	return 0;
}

#define TWICE(function) \
SEC("fentry/" #function) \
int BPF_PROG(out_##function, struct net *net, struct sock *sk, struct sk_buff *skb) \
{ return out_once(ctx, net, skb, true); } \
SEC("fentry/" #function) \
int BPF_PROG(again_##function, struct net *net, struct sock *sk, struct sk_buff *skb) \
{ return out_once(ctx, net, skb, false); }

TWICE(ip_output)
TWICE(ip_mc_output)
TWICE(ip6_output)
TWICE(xfrm4_output)
TWICE(xfrm6_output)

/* Will a VRF show this packet once more? See hooks_passes_vrf() in kmod/hooks.c. */
static __always_inline bool link_passes_vrf(const struct nf_hook_state *state, struct sk_buff *skb)
{
	struct net_device *dev = state->out;
	void *dst = (void *)(skb->_skb_refdst & ~1ULL);

	if (state->hook == NF_INET_FORWARD || !dev || !dst ||
	    !(BPF_CORE_READ_BITFIELD_PROBED(dev, priv_flags) &
	      bpf_core_enum_value(enum netdev_priv_flags___x, IFF_L3MDEV_MASTER___x)))
		return false;
	if (BPF_CORE_READ((struct dst_entry *)dst, dev) != dev)
		return true;
	return !((skb->protocol == bpf_htons(0x0800) ?
		  BPF_CORE_READ((struct rtable *)dst, rt_flags) :
		  BPF_CORE_READ((struct rt6_info *)dst, rt6i_flags)) & ROUTE_LOCAL);
}

/* After all other hooks of LOCAL_OUT and FORWARD, of both families. */
SEC("netfilter")
int link_out(struct bpf_nf_ctx *ctx)
{
	const struct nf_hook_state *state = ctx->state;
	struct sk_buff *skb = ctx->skb;
	struct net *net = state->net;
	struct counters *c;
	struct told *told;
	u32 cpu;

	c = counters_here(&cpu);
	told = told_here(cpu);
	if (!c || !told || !link_of(net))
		return NF_ACCEPT;
	__sync_fetch_and_add(&c->linked, 1);
	if (link_passes_vrf(state, skb)) {
		skip();
		return NF_ACCEPT;
	}
	out(net, state->sk, skb, false, state->hook == NF_INET_FORWARD);
	told->linked_skb = (u64)skb;
	return NF_ACCEPT;
}
#endif

#endif /* HUNTER_OUT_H */

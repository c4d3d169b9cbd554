/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_HOOKS_H
#define HUNTER_HOOKS_H
/*
 * Where packets come in. What arrives is kept for its processor from the door
 * of TCP or UDP until the stack itself has found the socket: no lookup is
 * predicted. What leaves is met behind LOCAL_OUT and NAT, where it is routed.
 */
#include "name.h"

/* The packet that this processor's TCP or UDP is at. */
struct slot {
	struct sniffer_record r;
	struct about found;	/* the socket that it is for, or that is answered for */
	u64 last;		/* address of the socket told last */
	u8 active;		/* its protocol, 0: none */
	u8 done;		/* its record is made */
	u8 known;		/* found is set */
	u8 unused[5];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct slot);
} slots SEC(".maps");

/* The connection that this processor's stack resets, after it has left its tables. */
struct reset {
	u64 cookie;
	u16 sport, dport;	/* of the packet that is answered */
	u8 listens;
	u8 unused[3];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct reset);
} resets SEC(".maps");

static __always_inline struct slot *slot_here(void)
{
	u32 zero = 0;
	struct slot *slot = bpf_map_lookup_elem(&slots, &zero);

	return slot && slot->active ? slot : NULL;
}

static __always_inline int in_begin(struct sk_buff *skb, u8 proto)
{
	struct net_device *dev;
	struct slot *slot;
	struct shape s;
	u32 zero = 0;

	slot = bpf_map_lookup_elem(&slots, &zero);
	if (!slot)
		return 0;
	__builtin_memset(slot, 0, sizeof(*slot));
	shape_in(skb, &s);
	slot->r.proto = proto;
	if (!parse(&slot->r, &s)) {
		skip();
		return 0;
	}
	dev = skb->dev;
	slot->r.ifindex = dev->ifindex;
	slot->r.netns = dev->nd_net.net->ns.inum;
	slot->r.dir = SNIFFER_DIR_IN;
	slot->active = proto;
	return 0;
}

SEC("fentry/tcp_v4_rcv")
int BPF_PROG(in_tcp4, struct sk_buff *skb) { return in_begin(skb, IPPROTO_TCP); }
SEC("fentry/tcp_v6_rcv")
int BPF_PROG(in_tcp6, struct sk_buff *skb) { return in_begin(skb, IPPROTO_TCP); }
SEC("fentry/udp_rcv")
int BPF_PROG(in_udp4, struct sk_buff *skb) { return in_begin(skb, IPPROTO_UDP); }
SEC("fentry/udpv6_rcv")
int BPF_PROG(in_udp6, struct sk_buff *skb) { return in_begin(skb, IPPROTO_UDP); }

/* The record of a further receiver begins as the first one's did. */
static __always_inline void in_again(struct sniffer_record *r)
{
	r->cookie = r->inode = r->start_ns = 0;
	r->tgid = r->tid = r->uid = r->creator = 0;
	__builtin_memset(r->comm, 0, sizeof(r->comm));
	r->flags = SNIFFER_F_COPY;
}

/* The stack has found the socket, of whatever kind: it is about to take the packet. */
static __always_inline int in_socket(struct sock *sk)
{
	struct slot *slot = slot_here();
	u16 family;

	if (!slot || !sk || slot->last == (u64)sk)
		return 0;
	family = sk->__sk_common.skc_family;
	if (family != AF_INET && family != AF_INET6)	/* nfnetlink_queue inside */
		return 0;
	if (slot->active == IPPROTO_UDP) {
		if (sk->sk_protocol != IPPROTO_UDP)
			return 0;
		if (slot->done)
			in_again(&slot->r);
	} else if (slot->done) {
		return 0;
	}
	slot->last = (u64)sk;
	__builtin_memset(&slot->found, 0, sizeof(slot->found));
	about_socket(sk, &slot->found);
	if (!slot->found.servers && !slot->found.cookie)
		slot->found.cookie = bpf_get_socket_cookie(sk);
	slot->known = 1;
	/* of a listener's packets only the end tells what became of them */
	if (slot->active == IPPROTO_TCP && slot->found.state == TCP_LISTEN)
		return 0;
	name(&slot->r, &slot->found, SNIFFER_HOW_SOCKET);
	emit(&slot->r);
	slot->done = 1;
	return 0;
}

/* Twice, for the one that is left out while it interrupts itself: see TWICE. */
SEC("fentry/sk_filter_trim_cap")
int BPF_PROG(in_filter, struct sock *sk) { return in_socket(sk); }
SEC("fentry/sk_filter_trim_cap")
int BPF_PROG(in_filter_again, struct sock *sk) { return in_socket(sk); }
/* before a tunnel's socket takes it; may be inlined in some kernel */
SEC("fentry/udp_queue_rcv_one_skb")
int BPF_PROG(in_queue4, struct sock *sk) { return in_socket(sk); }
SEC("fentry/udpv6_queue_rcv_one_skb")
int BPF_PROG(in_queue6, struct sock *sk) { return in_socket(sk); }

SEC("fentry/tcp_check_req")
int BPF_PROG(in_request, struct sock *sk, struct sk_buff *skb, struct request_sock *req)
{
	struct slot *slot = slot_here();

	if (!slot || slot->done || !req)
		return 0;
	__builtin_memset(&slot->found, 0, sizeof(slot->found));
	about_mini(&req->__req_common, &slot->found);
	if (!slot->found.servers && !slot->found.cookie)
		slot->found.cookie = bpf_get_socket_cookie((void *)req);
	slot->known = 1;
	name(&slot->r, &slot->found, SNIFFER_HOW_SOCKET);
	emit(&slot->r);
	slot->done = 1;
	return 0;
}

SEC("fentry/tcp_timewait_state_process")
int BPF_PROG(in_timewait, struct inet_timewait_sock *tw)
{
	struct slot *slot = slot_here();

	if (!slot || slot->done)
		return 0;
	__builtin_memset(&slot->found, 0, sizeof(slot->found));
	about_mini(&tw->__tw_common, &slot->found);
	slot->found.state = TCP_TIME_WAIT;
	slot->known = 1;
	return 0;
}

static __always_inline int in_end(void)
{
	struct slot *slot = slot_here();

	if (!slot)
		return 0;
	if (!slot->done) {
		if (slot->known)
			name(&slot->r, &slot->found, SNIFFER_HOW_SOCKET);
		else
			slot->r.how = SNIFFER_HOW_NO_SOCKET;
		emit(&slot->r);
	}
	slot->active = 0;
	return 0;
}

SEC("fexit/tcp_v4_rcv")
int BPF_PROG(end_tcp4) { return in_end(); }
SEC("fexit/tcp_v6_rcv")
int BPF_PROG(end_tcp6) { return in_end(); }
SEC("fexit/udp_rcv")
int BPF_PROG(end_udp4) { return in_end(); }
SEC("fexit/udpv6_rcv")
int BPF_PROG(end_udp6) { return in_end(); }

/*
 * Every child of a listener, of SYN cookies and Fast Open too: its packets are
 * the listener's owner's until it is accepted.
 */
SEC("fexit/inet_csk_clone_lock")
int BPF_PROG(child_made, struct sock *sk, struct request_sock *req, u32 priority,
	     struct sock *child)
{
	struct owner *o;
	struct sock *parent;
	u64 via, cookie;

	if (!child)
		return 0;
	cookie = bpf_get_socket_cookie(child);
	if (is_servers(sk)) {
		o = owner_make(cookie);
		if (o && !o->user.tgid) {
			o->servers = 1;
			o->dead = bpf_ktime_get_ns();
		}
		return 0;
	}
	via = sk->__sk_common.skc_cookie.counter;
	if (!owner_find(via)) {
		parent = BPF_CORE_READ(sk, sk_socket, sk);
		via = parent ? cookie_at(parent) : 0;
		if (!owner_find(via))
			return 0;
	}
	owner_refer(cookie, via, SNIFFER_HOW_LISTENER);
	return 0;
}

/* A listener closes and leaves what waits to another one. */
SEC("fexit/reuseport_migrate_sock")
int BPF_PROG(child_moved, struct sock *sk, struct sock *migrating, struct sk_buff *skb,
	     struct sock *heir)
{
	struct owner *o;
	u64 via;

	if (!heir || !migrating)
		return 0;
	via = heir->__sk_common.skc_cookie.counter;
	o = owner_find(migrating->__sk_common.skc_cookie.counter);
	if (o && o->via && via)
		o->via = via;
	return 0;
}

/* Fires before the reset leaves, in the same context. */
SEC("tp_btf/tcp_send_reset")
int BPF_PROG(reset_sent, const struct sock *sk, const struct sk_buff *skb)
{
	struct reset *reset;
	u8 ports[4];
	u32 zero = 0;

	if (!sk || !skb)
		return 0;
	reset = bpf_map_lookup_elem(&resets, &zero);
	if (!reset)
		return 0;
	bpf_probe_read_kernel(ports, sizeof(ports), BPF_CORE_READ(skb, head) +
			      BPF_CORE_READ(skb, transport_header));
	reset->cookie = cookie_at((void *)sk);
	reset->listens = BPF_CORE_READ(sk, __sk_common.skc_state) == TCP_LISTEN;
	reset->sport = ports[0] << 8 | ports[1];
	reset->dport = ports[2] << 8 | ports[3];
	return 0;
}

/*
 * A packet without a socket, or with one that the stack answers with: who is it
 * for? It leaves on the stack of the packet that it answers. Netfilter makes
 * packets without any (a firewall's reset, a copy), and IPVS sends on what came
 * in; of the stack's own only the SYN-ACKs of SYN cookies are such, IPv4's.
 */
__noinline int answer(struct sniffer_record *r, u32 has_socket, u32 arrived_on)
{
	const u8 both = TCP_SYN | TCP_ACK;
	struct slot *slot = slot_here();
	struct reset *reset;
	struct owner *o;
	u32 zero = 0;

	if (!r)
		return 0;
	r->how = SNIFFER_HOW_NO_SOCKET;
	if (has_socket && r->proto == IPPROTO_UDP) {
		name_kernel(r);
		return 0;
	}
	if (!has_socket && !slot && arrived_on) {
		r->dir = SNIFFER_DIR_FWD;
		r->how = SNIFFER_HOW_FORWARDED;
		return 0;
	}
	if (r->proto != IPPROTO_TCP || (!has_socket && (r->tcp_flags & both) != both))
		return 0;
	if (r->tcp_flags & TCP_RST) {
		reset = bpf_map_lookup_elem(&resets, &zero);
		if (reset && reset->cookie && reset->sport == r->dport &&
		    reset->dport == r->sport) {
			o = owner_find(reset->cookie);
			r->cookie = reset->cookie;
			reset->cookie = 0;
			if (o && !o->via && o->user.tgid) {
				name_owner(r, o, SNIFFER_HOW_REVERSE);
				/* any of them could have accepted what is refused */
				if (reset->listens && r->flags & SNIFFER_F_SHARED)
					r->flags |= SNIFFER_F_AMBIGUOUS;
				return 0;
			}
			r->cookie = 0;
		}
	}
	if (slot && slot->known && slot->active == IPPROTO_TCP)
		name(r, &slot->found, SNIFFER_HOW_REVERSE);
	return 0;
}

static __always_inline bool was_forwarded(struct sk_buff *skb, u8 family)
{
	u32 at = family == AF_INET ? bpf_core_field_offset(struct inet_skb_parm, flags) :
				     bpf_core_field_offset(struct inet6_skb_parm, flags);
	u16 flags = 0;

	bpf_probe_read_kernel(&flags, sizeof(flags), (void *)&skb->cb + at);
	return flags & (family == AF_INET ? IPSKB_FORWARDED : IP6SKB_FORWARDED);
}

static __always_inline void out_named(struct sniffer_record *r, struct net *net,
				      struct sock *given, struct sk_buff *skb)
{
	struct task_struct *current = bpf_get_current_task_btf();
	bool trusted = in_task_only(current) && !(current->flags & PF_KTHREAD);
	struct sock *sk = skb->sk;
	struct about a = {};
	struct socket *sock;
	struct owner *o;
	struct proc *user;
	struct key key;
	u16 family, port;
	u64 file;
	u8 state;

	/*
	 * Tunnels leave the inner sender in skb->sk and say with the other one, if
	 * at all, whose the packet is; IPv6 says there the listener of a SYN
	 * cookie, but also whose packet a firewall answers with a reset.
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
	if (a.full && a.servers && is_kernel(sk)) {
		if (sk->sk_type == SOCK_STREAM)
			name(r, &a, SNIFFER_HOW_SOCKET);
		else
			answer(r, 1, 0);
		return;
	}
	/* the kernel's wrapping around a packet, whose sender the socket still is */
	if (r->proto == IPPROTO_UDP) {
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
	/* The sender is on the CPU: nobody can know better. */
	r->how = SNIFFER_HOW_CONTEXT;
	r->cookie = a.cookie;
	r->inode = a.inode;
	key_of(current, &key);
	r->tgid = key.tgid;
	r->start_ns = key.start;
	r->tid = current->pid;
	r->uid = current->cred->uid.val;
	o = owner_find(a.cookie);
	if (o) {
		struct key named = o->user;

		user = bpf_map_lookup_elem(&procs, &named);
		name_facts(r, o, user);
		if (user && same(&named, &key)) {
			__builtin_memcpy(r->comm, user->comm, SNIFFER_COMM_LEN);
			return;
		}
	}
	comm_at(r->comm, current->group_leader->comm);
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
	emit(&r);
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

static __always_inline int out_once(struct net *net, struct sock *sk, struct sk_buff *skb)
{
	u32 zero = 0;
	struct told *told = bpf_map_lookup_elem(&tolds, &zero);
	u64 *last;

	if (!told)
		return 0;
	last = in_task_only(bpf_get_current_task_btf()) ? &told->skb[0] : &told->skb[1];
	if (*last == (u64)skb) {
		*last = 0;
		return 0;
	}
	out(net, sk, skb);
	*last = (u64)skb;
	return 0;
}

#define TWICE(function) \
SEC("fentry/" #function) \
int BPF_PROG(out_##function, struct net *net, struct sock *sk, struct sk_buff *skb) \
{ return out_once(net, sk, skb); } \
SEC("fentry/" #function) \
int BPF_PROG(again_##function, struct net *net, struct sock *sk, struct sk_buff *skb) \
{ return out_once(net, sk, skb); }

#ifndef HUNTER_PARTS
TWICE(ip_output)
TWICE(ip_mc_output)
TWICE(ip6_output)
TWICE(xfrm4_output)
TWICE(xfrm6_output)
#endif

#endif /* HUNTER_HOOKS_H */

/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_IN_H
#define HUNTER_IN_H
/*
 * Incoming packets, and the answers that the stack sends while it handles one. Each
 * processor keeps its packet from the entry of TCP or UDP until the stack has found the
 * socket. So no lookup has to be predicted.
 */
#include "name.h"

/* The packet that TCP or UDP is handling on this processor. */
struct slot {
	struct sniffer_record r;
	struct shape shape;
	struct about found;	/* its socket, or that of the answer */
	u64 last;		/* address of the socket that was reported last */
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

/* The connection that the stack resets here. It has left the stack's tables. */
struct reset {
	u64 cookie;
	u16 sport, dport;	/* of the packet that the reset answers */
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
	u32 zero = 0;

	slot = bpf_map_lookup_elem(&slots, &zero);
	if (!slot)
		return 0;
	__builtin_memset(slot, 0, sizeof(*slot));
	shape_in(skb, &slot->shape);
	slot->r.proto = proto;
	if (!parse(&slot->r, &slot->shape)) {
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

/* Begins the record of a further receiver, as the first one began. */
static __always_inline void in_again(struct sniffer_record *r)
{
	r->cookie = r->inode = r->start_ns = 0;
	r->tgid = r->tid = r->uid = r->creator = 0;
	__builtin_memset(r->comm, 0, sizeof(r->comm));
	r->flags = SNIFFER_F_COPY;
}

/* The stack has found the socket, and is about to give it the packet. */
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
	/* what becomes of a listener's packet shows only at its end */
	if (slot->active == IPPROTO_TCP && slot->found.state == TCP_LISTEN)
		return 0;
	name(&slot->r, &slot->found, SNIFFER_HOW_SOCKET);
	emit(&slot->r, &slot->shape);
	slot->done = 1;
	return 0;
}

/* Two of them: the kernel skips one that would interrupt itself, see TWICE. */
SEC("fentry/sk_filter_trim_cap")
int BPF_PROG(in_filter, struct sock *sk) { return in_socket(sk); }
SEC("fentry/sk_filter_trim_cap")
int BPF_PROG(in_filter_again, struct sock *sk) { return in_socket(sk); }
/* before a tunnel's socket takes the packet; some kernels inline this function */
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
	emit(&slot->r, &slot->shape);
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
		emit(&slot->r, &slot->shape);
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
 * A listener gets a child, also by a SYN cookie or Fast Open. Until the child is
 * accepted, its packets belong to the listener's owner.
 */
SEC("fexit/inet_csk_clone_lock")
int BPF_PROG(child_made, struct sock *sk, struct request_sock *req, u32 priority,
	     struct sock *child)
{
	struct sock *parent;
	struct owner *o;
	u64 via, cookie;

	if (!child)
		return 0;
	cookie = bpf_get_socket_cookie(child);
	if (is_servers(sk)) {
		owner_kernel(cookie);
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
	/* it may wait for long, and probe_free() sees its end */
	o = wants(child) ? owner_find(cookie) : NULL;
	if (o && o->via)
		o->dead = 0;
	return 0;
}

/* A listener closes. Another listener gets the connections that wait. */
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
 * Names the connection of a packet without a socket. The socket that the stack uses
 * for all its answers counts as none. The packet is sent while the stack handles the
 * one that it answers. Packets without a socket are
 * - Netfilter's: a firewall's reset, a copy;
 * - those that IPVS forwards;
 * - SYN-ACKs of IPv4 SYN cookies.
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
	/* in parts nothing reports the end of the stack's work on a packet */
	if (parts && slot && (slot->r.sport != r->dport || slot->r.dport != r->sport))
		slot = NULL;
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
				/*
				 * each of the holders could have accepted the connection that
				 * is refused
				 */
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

#endif /* HUNTER_IN_H */

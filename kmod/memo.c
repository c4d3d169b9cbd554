// SPDX-License-Identifier: GPL-2.0-only
/*
 * A shortcut for packets like one that this CPU recorded a moment ago: same ends, same
 * socket, same user. Their record is the earlier one, but for time, sizes, thread and
 * TCP flags.
 *
 * For each packet, comparisons prove that the memo still holds:
 * - the entry's version is the one read before the earlier packet was named. So neither
 *   the entry nor its user has changed or been freed, see struct sniffer_stripe;
 * - whatever changes without that version is compared: name, uid, exit and forks of the
 *   user, file and port of the socket, the task on the CPU;
 * - for an incoming packet, the socket is the one that the stack will find. A UDP
 *   socket is alone in its hash slot, and its addresses fit. A TCP connection is in its
 *   bucket.
 *
 * If anything differs, the packet is named as usual (lookup.c, name.c). Some packets never
 * have a memo:
 * - handshakes, and packets to listeners;
 * - packets named after another socket, or after a user that has closed the socket;
 * - multicast, IPv4 headers with options, VRFs.
 */
#include <linux/hash.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/slab.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <net/inet_hashtables.h>
#include <net/ip.h>
#include <net/ipv6.h>
#include <net/tcp.h>
#include <net/udp.h>

#include "alive.h"
#include "batch.h"
#include "compat.h"
#include "memo.h"
#include "merge.h"
#include "owner.h"
#include "parse.h"
#include "process.h"

#define MEMO_BITS	7	/* memos of a CPU; at 256 bytes each */

/* Bits of struct memo.kind, above the protocol. */
#define MEMO_IN		BIT(8)
#define MEMO_IP6	BIT(9)
#define MEMO_TRUSTED	BIT(10)	/* named after the task on the CPU */
#define MEMO_LOOKUP	BIT(11)	/* incoming, found by a lookup */

/**
 * struct memo - a packet's record, and all that must still be so for the record to hold
 * @kind: protocol and MEMO_... bits, 0: empty
 * @ports: as they are in the packet
 * @net: its network namespace
 * @sk: its socket
 * @stripe: stripe of @owner
 * @version: version of @stripe
 * @num: local port of @sk
 * @many: another process may have the socket, see sniffer_owner_shared()
 * @sock: socket of @sk
 * @owner: entry that it was named after
 * @user: user of @owner
 * @forked: last fork of @user
 * @place: where it was added up, see sniffer_merge_add()
 * @hash: hash under which the stack finds @sk
 * @any: the same if @sk is bound to no address (UDP)
 * @met: hash of what went out last, and would have had its place here
 * @comm: if MEMO_TRUSTED, raw comm of current's leader
 * @record: the record
 *
 * Used by its own CPU, with bottom halves off. No pointer may be dereferenced before
 * @version was found to match.
 */
struct memo {
	u32 kind;
	u32 ports;
	const struct net *net;
	const struct sock *sk;
	const struct sniffer_stripe *stripe;
	unsigned int version;
	u16 num;
	bool many;
	const struct socket *sock;
	struct sniffer_owner *owner;
	struct sniffer_proc *user;
	u64 forked;
	struct sniffer_merge_place place;
	u32 hash;
	u32 any;
	u32 met;
	char comm[SNIFFER_COMM_LEN] __aligned(sizeof(u64));
	struct sniffer_record record;
} ____cacheline_aligned;

static DEFINE_PER_CPU(struct memo *, memos);	/* 1 << MEMO_BITS of them; set at load only */

static __always_inline u32 memo_kind(const struct sk_buff *skb, u8 family, u8 dir, bool trusted)
{
	u32 kind = family == AF_INET6 ? MEMO_IP6 : 0;

	if (dir == SNIFFER_DIR_OUT)
		return kind | (trusted ? MEMO_TRUSTED : 0);
	return kind | MEMO_IN | (skb->sk ? 0 : MEMO_LOOKUP);
}

/* Both ports in network byte order. */
static u32 memo_ports(const struct sniffer_record *r)
{
	const __be16 ports[] = { htons(r->sport), htons(r->dport) };
	u32 both;

	memcpy(&both, ports, sizeof(both));
	return both;
}

static __always_inline u64 memo_hash(const struct sniffer_ends *ends, u32 kind)
{
	u64 hash = (u64)ends->ports << 32 | kind;

	if (kind & MEMO_IP6) {
		const u64 *from = ends->saddr, *to = ends->daddr;

		hash ^= get_unaligned(from) ^ get_unaligned(from + 1);
		hash += get_unaligned(to) ^ get_unaligned(to + 1);
	} else {
		hash ^= *(const u32 *)ends->saddr;
		hash += (u64)*(const u32 *)ends->daddr << 12;
	}
	return hash * GOLDEN_RATIO_64;
}

/* The place for packets with this hash. */
static __always_inline struct memo *memo_of(u64 hash)
{
	return this_cpu_read(memos) + (hash >> (64 - MEMO_BITS));
}

static __always_inline bool memo_has_ends(const struct memo *memo, const struct sniffer_ends *ends,
					  u32 kind)
{
	if (memo->kind != kind || memo->ports != ends->ports)
		return false;
	if (kind & MEMO_IP6)
		return !memcmp(memo->record.saddr, ends->saddr, 16) &&
		       !memcmp(memo->record.daddr, ends->daddr, 16);
	return *(const u32 *)memo->record.saddr == *(const u32 *)ends->saddr &&
	       *(const u32 *)memo->record.daddr == *(const u32 *)ends->daddr;
}

/* Is an IPv4 packet for several sockets? */
static __always_inline bool memo_is_for_many(const struct sk_buff *skb)
{
	const struct rtable *rt = skb_rtable(skb);

	return !rt || rt->rt_flags & (RTCF_BROADCAST | RTCF_MULTICAST);
}

/* Is the memo's socket alone in the slot? It may have been freed, so it is not dereferenced. */
static __always_inline bool memo_is_alone(const struct udp_hslot *slot, const struct sock *sk)
{
	return slot->count == 1 &&
	       rcu_access_pointer(hlist_first_rcu(&slot->head)) == &udp_sk(sk)->udp_portaddr_node;
}

/*
 * Will the stack find the memo's socket for a datagram? The stack looks first among
 * sockets bound to the address, then among sockets bound to none.
 */
static bool memo_finds_udp(const struct memo *memo, struct net *net)
{
	struct udp_table *table = sniffer_udp_table(net);
	const struct sniffer_record *r = &memo->record;
	const struct udp_hslot *slot = udp_hashslot2(table, memo->hash), *any;
	const struct inet_sock *inet = inet_sk(memo->sk);
	const struct sock *sk = memo->sk;

	if (!memo_is_alone(slot, sk)) {
		any = udp_hashslot2(table, memo->any);
		if (slot->count || !memo_is_alone(any, sk))
			return false;
	}
	/* a program may choose another socket */
	if (static_branch_unlikely(&bpf_sk_lookup_enabled) || sk->sk_reuseport ||
	    sk->sk_bound_dev_if)
		return false;
	if (inet->inet_num != r->dport || (inet->inet_dport && inet->inet_dport != htons(r->sport)))
		return false;
	if (r->family == AF_INET6)
		return sk->sk_family == AF_INET6 &&
		       (ipv6_addr_any(&sk->sk_v6_rcv_saddr) ||
			!memcmp(&sk->sk_v6_rcv_saddr, r->daddr, 16)) &&
		       (ipv6_addr_any(&sk->sk_v6_daddr) || !memcmp(&sk->sk_v6_daddr, r->saddr, 16));
	return !ipv6_only_sock(sk) &&
	       (!sk->sk_rcv_saddr || sk->sk_rcv_saddr == *(const __be32 *)r->daddr) &&
	       (!sk->sk_daddr || sk->sk_daddr == *(const __be32 *)r->saddr);
}

/* Is it a connection between the ends of @r, which came in? It may have got others since. */
static bool memo_is_between(const struct sock *sk, const struct sniffer_record *r)
{
	if (sk->sk_num != r->dport || sk->sk_dport != htons(r->sport))
		return false;
	if (r->family == AF_INET6)
		return !memcmp(&sk->sk_v6_daddr, r->saddr, 16) &&
		       !memcmp(&sk->sk_v6_rcv_saddr, r->daddr, 16);
	return sk->sk_daddr == *(const __be32 *)r->saddr &&
	       sk->sk_rcv_saddr == *(const __be32 *)r->daddr;
}

/* The same for TCP: is the memo's connection where the stack looks? */
static bool memo_finds_tcp(const struct memo *memo, struct net *net)
{
	struct inet_hashinfo *table = net->ipv4.tcp_death_row.hashinfo;
	const struct hlist_nulls_node *node, *wanted = &memo->sk->sk_nulls_node;

	node = rcu_dereference(hlist_nulls_first_rcu(&inet_ehash_bucket(table, memo->hash)->chain));
	while (!is_a_nulls(node) && node != wanted)
		node = rcu_dereference(hlist_nulls_next_rcu(node));
	return node == wanted && !memo->sk->sk_bound_dev_if &&
	       memo_is_between(memo->sk, &memo->record);
}

static __always_inline bool memo_is_comm(const char *one, const char *other)
{
	const u64 *a = (const u64 *)one, *b = (const u64 *)other;

	return a[0] == b[0] && a[1] == b[1];
}

/* Is the task's name the record's? @raw may have old bytes behind its NUL. */
static bool memo_is_name(const char *raw, const char *name)
{
	char clean[SNIFFER_COMM_LEN] __aligned(sizeof(u64));

	if (likely(memo_is_comm(raw, name)))
		return true;
	sniffer_comm_copy(clean, raw);
	return memo_is_comm(clean, name);
}

/* Is everything as it was when @memo was made? */
static __always_inline bool memo_holds(const struct memo *memo, u32 kind,
				       struct sk_buff *skb,
				       const struct nf_hook_state *state, struct net *net)
{
	const struct sniffer_record *r = &memo->record;
	const struct sock *sk = memo->sk;
	const struct task_struct *leader;

	if (sniffer_owner_version(memo->stripe) != memo->version || memo->net != net ||
	    !sniffer_probes_alive())
		return false;
	if (kind & MEMO_LOOKUP) {
		if (kind & MEMO_IP6 ? inet6_sdif(skb) : (inet_sdif(skb) || memo_is_for_many(skb)))
			return false;
		if ((u8)kind == IPPROTO_TCP ? !memo_finds_tcp(memo, net) :
					      !memo_finds_udp(memo, net))
			return false;
	} else if (skb->sk != sk || (!(kind & MEMO_IN) && state->sk != sk)) {
		return false;
	}
	if (atomic64_read(&sk->sk_cookie) != r->cookie || READ_ONCE(sk->sk_socket) != memo->sock ||
	    inet_sk(sk)->inet_num != memo->num)
		return false;

	if (READ_ONCE(memo->user->exit_jiffies) || READ_ONCE(memo->user->forked) != memo->forked ||
	    READ_ONCE(memo->user->uid) != r->uid)
		return false;
	if (unlikely(memo->many) && sniffer_owner_shared(memo->owner, memo->user) !=
				    !!(r->flags & SNIFFER_F_SHARED))
		return false;
	if (!(kind & MEMO_TRUSTED))
		return memo_is_comm(memo->user->comm, r->comm);
	leader = current->group_leader;
	return current->pid == r->tid && leader->start_boottime == r->start_ns &&
	       __kuid_val(current_uid()) == r->uid && memo_is_comm(leader->comm, memo->comm);
}

/* A SYN is named as usual: most are the first packet of their kind. */
static __always_inline bool memo_is_handshake(const struct sk_buff *skb,
					      const struct sniffer_ends *ends)
{
	return ends->proto == IPPROTO_TCP &&
	       tcp_flag_byte((const struct tcphdr *)(skb->data + ends->thoff)) & TCPHDR_SYN;
}

/*
 * The stack need not look the connection up again. Another CPU may have freed it since
 * it was found, and another connection may have its place by now.
 */
static __always_inline void memo_hand_on(const struct memo *memo, struct sk_buff *skb)
{
	struct sock *sk = (struct sock *)memo->sk;

	if (!refcount_inc_not_zero(&sk->sk_refcnt))
		return;
	if (likely(atomic64_read(&sk->sk_cookie) == memo->record.cookie))
		sniffer_lookup_hand_on(skb, sk);
	else
		sniffer_lookup_put(sk);
}

static __always_inline bool memo_record(struct sk_buff *skb, const struct nf_hook_state *state,
					const struct sniffer_ends *ends, u32 kind, struct net *net,
					const struct net_device *dev)
{
	struct memo *memo = memo_of(memo_hash(ends, kind));
	struct sniffer_record *r = &memo->record;

	if (!memo_has_ends(memo, ends, kind) || r->ifindex != (dev ? dev->ifindex : 0) ||
	    !memo_holds(memo, kind, skb, state, net))
		return false;
	/* a cache line that all threads share: written if it has to be */
	if (!(kind & MEMO_TRUSTED))
		r->tid = READ_ONCE(memo->owner->tid);
	else if (READ_ONCE(memo->owner->tid) != r->tid)
		WRITE_ONCE(memo->owner->tid, r->tid);
	r->time_ns = ktime_get_ns();
	if ((u8)kind == IPPROTO_TCP) {
		const struct tcphdr *tcp = (const struct tcphdr *)(skb->data + ends->thoff);

		r->tcp_flags = tcp_flag_byte(tcp);
		r->hdr_len = ends->thoff + tcp->doff * 4;
	}
	sniffer_parse_sizes(r, skb);
	sniffer_batch_add(r, skb, &memo->place);
	if (kind & MEMO_LOOKUP && (u8)kind == IPPROTO_TCP)
		memo_hand_on(memo, skb);
	return true;
}

static __always_inline bool memo_packet(struct sk_buff *skb, const struct nf_hook_state *state,
					u8 family, u8 dir)
{
	bool in = dir == SNIFFER_DIR_IN;
	struct net *net = in ? dev_net(skb->dev) : state->net;
	bool task = !softirq_count(), done;
	struct sniffer_ends ends;
	u32 kind;

	if (!sniffer_batch_was_wanted() || !sniffer_parse_plain(skb, family, &ends) ||
	    memo_is_handshake(skb, &ends))
		return false;
	kind = memo_kind(skb, family, dir, !in && sniffer_trust_current()) | ends.proto;
	if (task)
		local_bh_disable();
	done = memo_record(skb, state, &ends, kind, net, in ? skb->dev : state->out);
	if (task)
		local_bh_enable();
	return done;
}

/*
 * sniffer_memo_in4() and the others record a packet that has a memo. @skb's data begins
 * at the IP header; under RCU. Return: false when nothing was done.
 */
#define MEMO_FUNCTION(name, family, dir)					\
bool name(struct sk_buff *skb, const struct nf_hook_state *state)		\
{										\
	return memo_packet(skb, state, family, dir);				\
}

MEMO_FUNCTION(sniffer_memo_in4, AF_INET, SNIFFER_DIR_IN)
MEMO_FUNCTION(sniffer_memo_out4, AF_INET, SNIFFER_DIR_OUT)
MEMO_FUNCTION(sniffer_memo_in6, AF_INET6, SNIFFER_DIR_IN)
MEMO_FUNCTION(sniffer_memo_out6, AF_INET6, SNIFFER_DIR_OUT)

/* Can a memo be made of this record? */
static bool memo_is_wanted(const struct sniffer_flow *flow, bool trusted)
{
	const u8 how = flow->record.how;
	const struct sk_buff *skb = flow->skb;
	const struct sock *sk = flow->sk;
	const struct socket *sock;

	if (flow->thoff != (flow->record.family == AF_INET ? sizeof(struct iphdr) :
							     sizeof(struct ipv6hdr)))
		return false;
	if (!flow->owner || flow->version & 1 || !sniffer_probes_alive() ||
	    flow->record.flags & (SNIFFER_F_DEAD | SNIFFER_F_COPY))
		return false;
	if (how != SNIFFER_HOW_SOCKET && how != SNIFFER_HOW_CONTEXT)
		return false;
	/* what IPsec makes of a packet passes the hook again, and may look like it */
	if (flow->record.dir == SNIFFER_DIR_OUT &&
	    (skb->sk != sk || trusted != (how == SNIFFER_HOW_CONTEXT) || dst_xfrm(skb_dst(skb))))
		return false;
	sock = READ_ONCE(sk->sk_socket);
	return sock && READ_ONCE(sock->file) && flow->record.inode;
}

/* The hash under which the stack will look for this socket. */
static void memo_note_place(struct memo *memo, const struct sniffer_flow *flow)
{
	const struct sniffer_record *r = &flow->record;
	const struct in6_addr *to6 = (const struct in6_addr *)r->daddr;

	if (r->proto == IPPROTO_TCP) {
		memo->hash = flow->sk->sk_hash;
	} else if (r->family == AF_INET) {
		memo->hash = ipv4_portaddr_hash(flow->net, *(const __be32 *)r->daddr, r->dport);
		memo->any = ipv4_portaddr_hash(flow->net, htonl(INADDR_ANY), r->dport);
	} else {
		memo->hash = ipv6_portaddr_hash(flow->net, to6, r->dport);
		memo->any = ipv6_portaddr_hash(flow->net, &in6addr_any, r->dport);
	}
}

/**
 * sniffer_memo_keep - make a memo of a packet
 * @flow: the packet, recorded
 * @trusted: current may be taken for its sender
 *
 * Under RCU, bottom halves off. What goes out is remembered from the second one on:
 * it needs no look-up, and many a connection has few.
 */
void sniffer_memo_keep(const struct sniffer_flow *flow, bool trusted)
{
	const struct sniffer_record *r = &flow->record;
	struct sniffer_ends ends;
	struct memo *memo;
	u64 hash;
	u32 kind;

	ends.saddr = r->saddr;
	ends.daddr = r->daddr;
	ends.ports = memo_ports(r);
	kind = memo_kind(flow->skb, r->family, r->dir, trusted) | r->proto;
	hash = memo_hash(&ends, kind);
	memo = memo_of(hash);
	if (r->dir == SNIFFER_DIR_OUT && memo->met != (u32)hash) {
		memo->met = hash;
		return;
	}
	if (!memo_is_wanted(flow, trusted))
		return;
	memo->kind = 0;
	memo->ports = ends.ports;
	memo->net = flow->net;
	memo->sk = flow->sk;
	memo->stripe = sniffer_owner_stripe(r->cookie);
	memo->version = flow->version;
	memo->num = inet_sk(flow->sk)->inet_num;
	memo->sock = READ_ONCE(flow->sk->sk_socket);
	memo->owner = flow->owner;
	memo->user = rcu_dereference(flow->owner->user);
	memo->forked = READ_ONCE(memo->user->forked);
	memo->many = READ_ONCE(flow->owner->many) ||
		     (s64)(memo->forked - flow->owner->since) > 0;
	memo->place = flow->place;
	if (kind & MEMO_LOOKUP)
		memo_note_place(memo, flow);
	memo->record = *r;
	/* what has changed meanwhile has changed the version, or is compared each time, but for the name */
	memo->kind = kind;
	if (kind & MEMO_TRUSTED) {
		memcpy(memo->comm, current->group_leader->comm, sizeof(memo->comm));
		if (!memo_is_name(memo->comm, r->comm) || flow->owner->port != memo->num)
			memo->kind = 0;
	}
}

/* The hooks are gone, or were never there. */
void sniffer_memo_exit(void)
{
	int cpu;

	for_each_possible_cpu(cpu)
		kvfree(per_cpu(memos, cpu));
}

int sniffer_memo_init(void)
{
	struct memo *memo;
	int cpu;

	BUILD_BUG_ON(sizeof(struct memo) != 256);
	for_each_possible_cpu(cpu) {
		memo = kvzalloc_node(sizeof(*memo) << MEMO_BITS, GFP_KERNEL, cpu_to_node(cpu));
		per_cpu(memos, cpu) = memo;
		if (!memo) {
			sniffer_memo_exit();
			return -ENOMEM;
		}
	}
	return 0;
}

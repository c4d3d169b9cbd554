// SPDX-License-Identifier: GPL-2.0-only
/*
 * Where packets come in: Netfilter hooks in every network namespace. They
 * accept every packet and change none (lookup.c may settle its socket early);
 * each becomes a record or is counted.
 *
 * Priority last, everywhere: after NAT, so that a record has the addresses
 * under which the packet goes on (for LOCAL_IN those of the socket), and after
 * filter, so that what a firewall drops was neither sent nor received.
 */
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/mm.h>
#include <linux/netfilter.h>
#include <linux/netfilter_ipv4.h>
#include <linux/netfilter_ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <net/ipv6.h>
#include <net/mptcp.h>
#include <net/net_namespace.h>
#include <net/request_sock.h>
#include <net/tcp.h>

#include "batch.h"
#include "compat.h"
#include "hooks.h"
#include "lookup.h"
#include "netlink.h"
#include "owner.h"
#include "probes.h"
#include "process.h"

/*
 * May current be taken for the sender? Bottom halves off means that some
 * other task's work runs here (a tun write runs the whole stack so); testing
 * current->mm would lose the FIN of an exiting process.
 */
static bool hooks_trust_current(void)
{
	return in_task() && !softirq_count() && !(current->flags & PF_KTHREAD);
}

/*
 * A socket of the kernel's own: flagged so, or without a file (nvmet and iSCSI
 * make theirs as a process does). MPTCP makes its subflows in the same ways; the
 * type tells the stack's control sockets, which are raw, from TCP's.
 */
static bool hooks_is_kernel(const struct sock *sk)
{
	const struct socket *sock = READ_ONCE(sk->sk_socket);

	if (!sk->sk_kern_sock && (!sock || READ_ONCE(sock->file)))
		return false;
	return !(sk->sk_type == SOCK_STREAM && sk->sk_protocol == IPPROTO_TCP && sk_is_mptcp(sk));
}

/* Has a server in the kernel put something of its own there? BPF's maps mark what they put. */
static bool hooks_has_server(const struct sock *sk)
{
	unsigned long data = (unsigned long)READ_ONCE(sk->sk_user_data);

	return data && !(data & 7);
}

/*
 * A listener that a kernel's server accepts from: its own, or one that a process
 * has handed to it (knfsd) and may have closed since.
 */
static bool hooks_is_servers(const struct sock *sk)
{
	return hooks_is_kernel(sk) || (sk->sk_state == TCP_LISTEN && hooks_has_server(sk));
}

/*
 * Is this flagged socket a connection that waits to be accepted from an MPTCP
 * listener, by a client of plain TCP? It is a copy of the listener's subflow.
 */
static bool hooks_is_fallback(struct sniffer_flow *flow, const struct sock *sk)
{
	struct sock *listener;

	if (flow->record.proto != IPPROTO_TCP || READ_ONCE(sk->sk_socket))
		return false;
	if (sniffer_owner_find(atomic64_read(&sk->sk_cookie)))
		return true;
	listener = sniffer_lookup_listener(flow, flow->record.dir == SNIFFER_DIR_OUT);
	return listener && !hooks_is_servers(listener);
}

/* False when the packet has been counted as skipped. */
static bool hooks_parse(struct sniffer_flow *flow)
{
	struct sniffer_record *r = &flow->record;
	struct sk_buff *skb = flow->skb;
	enum sniffer_skip why = SNIFFER_SKIP_TRUNCATED;
	union {
		struct iphdr ip;
		struct ipv6hdr ip6;
		struct tcphdr tcp;
		struct udphdr udp;
	} buf;
	unsigned short fragment = 0;
	int proto;

	if (r->family == AF_INET) {
		const struct iphdr *ip = skb_header_pointer(skb, 0, sizeof(buf.ip), &buf);

		if (!ip)
			goto skip;
		proto = ip->protocol;
		fragment = ntohs(ip->frag_off) & IP_OFFSET;
		flow->thoff = ip->ihl * 4;
		memcpy(r->saddr, &ip->saddr, 4);
		memcpy(r->daddr, &ip->daddr, 4);
	} else {
		const struct ipv6hdr *ip6 = skb_header_pointer(skb, 0, sizeof(buf.ip6), &buf);

		if (!ip6)
			goto skip;
		memcpy(r->saddr, &ip6->saddr, 16);
		memcpy(r->daddr, &ip6->daddr, 16);
		flow->thoff = 0;
		proto = ipv6_find_hdr(skb, (unsigned int *)&flow->thoff, -1, &fragment, NULL);
		if (proto < 0)
			goto skip;
	}

	why = SNIFFER_SKIP_OTHER;
	if (proto != IPPROTO_TCP && proto != IPPROTO_UDP)
		goto skip;
	why = SNIFFER_SKIP_FRAGMENT;
	if (fragment)
		goto skip;
	why = SNIFFER_SKIP_TRUNCATED;
	if (proto == IPPROTO_TCP) {
		const struct tcphdr *tcp = skb_header_pointer(skb, flow->thoff, sizeof(buf.tcp),
							      &buf);

		if (!tcp)
			goto skip;
		r->sport = ntohs(tcp->source);
		r->dport = ntohs(tcp->dest);
		r->tcp_flags = tcp_flag_byte(tcp);
		r->hdr_len = min(flow->thoff + tcp->doff * 4, 255);
	} else {
		const struct udphdr *udp = skb_header_pointer(skb, flow->thoff, sizeof(buf.udp),
							      &buf);

		if (!udp)
			goto skip;
		r->sport = ntohs(udp->source);
		r->dport = ntohs(udp->dest);
		r->hdr_len = min_t(int, flow->thoff + sizeof(*udp), 255);
	}
	r->proto = proto;
	r->len = skb->len;
	r->gso_segs = 1;
	if (skb_is_gso(skb)) {
		r->gso_segs = skb_shinfo(skb)->gso_segs;
		if (!r->gso_segs)
			r->gso_segs = max_t(int, 1, DIV_ROUND_UP((int)(skb->len - r->hdr_len),
								 skb_shinfo(skb)->gso_size));
	}
	return true;
skip:
	sniffer_batch_skip(why);
	return false;
}

/* The kernel itself sends or receives the packet. */
static void hooks_name_kernel(struct sniffer_record *r)
{
	r->how = SNIFFER_HOW_KERNEL;
	r->flags |= SNIFFER_F_KERNEL;
}

static void hooks_add_facts(struct sniffer_record *r, const struct sniffer_owner *owner,
			    const struct sniffer_proc *user)
{
	r->creator = owner->creator;
	r->flags |= READ_ONCE(owner->flags);
	if (!sniffer_owner_held(owner, user))
		r->flags |= SNIFFER_F_DEAD;
	else if (sniffer_owner_shared(owner, user))
		r->flags |= SNIFFER_F_SHARED |
			    (READ_ONCE(owner->guess) ? SNIFFER_F_AMBIGUOUS : 0);
}

/* Names @r after @owner's user, with what else the table knows of the socket. Under RCU. */
static void hooks_name_owner(struct sniffer_record *r, const struct sniffer_owner *owner, u8 how)
{
	const struct sniffer_proc *user = rcu_dereference(owner->user);

	r->how = how;
	r->tgid = user->tgid;
	r->start_ns = user->start_ns;
	r->uid = READ_ONCE(user->uid);
	r->tid = READ_ONCE(owner->tid);
	memcpy(r->comm, user->comm, SNIFFER_COMM_LEN);
	hooks_add_facts(r, owner, user);
}

/* The table's entry with a user for @sk: by cookie, else by inode (MPTCP). */
static const struct sniffer_owner *hooks_find(struct sock *sk)
{
	const struct sniffer_owner *owner = sniffer_owner_find(sniffer_owner_cookie(sk));
	u64 inode;

	if (!owner || !rcu_access_pointer(owner->user)) {
		inode = sniffer_owner_inode(sk);
		owner = inode ? sniffer_owner_find_inode(inode) : NULL;
	}
	return owner && rcu_access_pointer(owner->user) ? owner : NULL;
}

static bool hooks_is_held(const struct sniffer_owner *owner)
{
	const struct sniffer_proc *user = rcu_dereference(owner->user);

	return user && sniffer_owner_held(owner, user);
}

/* Names @r after the one who would accept the connection. */
static void hooks_name_acceptor(struct sniffer_record *r, const struct sniffer_owner *listener)
{
	hooks_name_owner(r, listener, SNIFFER_HOW_LISTENER);
	if (r->flags & SNIFFER_F_SHARED)
		r->flags |= SNIFFER_F_AMBIGUOUS;
}

/* Why does the table not know @sk? @fresh: no probe had ever seen it. */
static u8 hooks_reason(const struct sock *sk, bool fresh)
{
	bool full = sk_fullsock(sk);

	/* a full table may never have taken it */
	if (!fresh && sniffer_probes_alive() && sniffer_owner_is_full())
		return SNIFFER_HOW_TABLE_FULL;
	if (!full || (sk->sk_state != TCP_LISTEN && sock_flag(sk, SOCK_DEAD)))
		return fresh ? SNIFFER_HOW_PREDATES : SNIFFER_HOW_SOCKET_GONE;
	if (!sniffer_probes_alive())
		return SNIFFER_HOW_NOT_PROBED;
	return sniffer_owner_full() ? SNIFFER_HOW_TABLE_FULL : SNIFFER_HOW_PREDATES;
}

/* A connection that has not become a full socket yet. */
static void hooks_name_request(struct sniffer_record *r, struct sock *sk, bool fresh)
{
	struct sock *listener = inet_reqsk(sk)->rsk_listener;
	const struct sniffer_owner *owner;

	if (!listener) {
		r->how = SNIFFER_HOW_SOCKET_GONE;
		return;
	}
	if (hooks_is_servers(listener)) {
		hooks_name_kernel(r);
		return;
	}
	owner = hooks_find(listener);
	if (!owner) {
		r->how = hooks_reason(listener, fresh);
		return;
	}
	if (r->dir == SNIFFER_DIR_IN && r->tcp_flags & TCPHDR_ACK && !(r->tcp_flags & TCPHDR_RST))
		sniffer_owner_refer(sk, owner->cookie, SNIFFER_HOW_LISTENER);
	hooks_name_acceptor(r, owner);
}

/*
 * Is accept() on another CPU giving @sk its socket right now? Then it has its
 * inode already, but the probe may not have told its owner yet.
 */
static bool hooks_is_grafted_now(struct sock *sk)
{
	bool busy;

	local_bh_disable();
	/* sock_graft() holds it while it does so, and calls what we probe */
	busy = !read_trylock(&sk->sk_callback_lock);
	if (!busy)
		read_unlock(&sk->sk_callback_lock);
	local_bh_enable();
	return busy;
}

/* Names @r after the owner of @sk, or says in r->how why not. */
static void hooks_name_socket(struct sniffer_flow *flow, struct sock *sk, u8 how)
{
	struct sniffer_record *r = &flow->record;
	bool fresh = !atomic64_read(&sk->sk_cookie);
	const struct sniffer_owner *owner, *other, *gone = NULL;
	bool full = sk_fullsock(sk);
	struct sock *listener;
	bool grafted = false;
	bool young;
	u64 via;

	if (full && hooks_is_servers(sk) && !hooks_is_fallback(flow, sk)) {
		hooks_name_kernel(r);
		return;
	}
	r->cookie = sniffer_owner_cookie(sk);
	if (sk->sk_state == TCP_NEW_SYN_RECV) {
		hooks_name_request(r, sk, fresh);
		return;
	}
	if (full)
		r->inode = sniffer_owner_inode(sk);
	if (full && sk->sk_state == TCP_LISTEN) {
		owner = hooks_find(sk);
		if (owner)
			hooks_name_acceptor(r, owner);
		else
			r->how = hooks_reason(sk, fresh);
		return;
	}

	owner = sniffer_owner_find(r->cookie);
	/* datagrams are received by the server itself: who handed the socket over has let go of it */
	if (full && owner && hooks_has_server(sk) && !hooks_is_held(owner)) {
		hooks_name_kernel(r);
		return;
	}
	/* read once: accept() may clear it meanwhile, with the new user in place */
	via = owner ? smp_load_acquire(&owner->via) : 0;
	if (owner && !via && rcu_access_pointer(owner->user)) {
		hooks_name_owner(r, owner, how);
		return;
	}
	if (r->inode) {
		other = sniffer_owner_find_inode(r->inode);
		if (other && rcu_access_pointer(other->user)) {
			sniffer_owner_refer(sk, other->cookie, SNIFFER_HOW_INODE);
			hooks_name_owner(r, other, SNIFFER_HOW_INODE);
			return;
		}
	}
	if (via) {
		other = sniffer_owner_find(via);
		if (other && rcu_access_pointer(other->user)) {
			if (READ_ONCE(owner->via_how) != SNIFFER_HOW_LISTENER) {
				hooks_name_owner(r, other, SNIFFER_HOW_INODE);
				return;
			}
			/* the listener itself is freed, and so dead, only after a grace period */
			if (!full || sock_flag(sk, SOCK_DEAD) ||
			    (hooks_is_held(other) && !READ_ONCE(other->dead))) {
				hooks_name_acceptor(r, other);
				return;
			}
			gone = other;
		}
	}
	if (full && r->inode && r->proto == IPPROTO_TCP) {
		grafted = hooks_is_grafted_now(sk);
		owner = grafted ? NULL : sniffer_owner_find(r->cookie);
		/* the entry may be there by now: pairs with sniffer_owner_gain() */
		if (owner && !smp_load_acquire(&owner->via) && rcu_access_pointer(owner->user)) {
			hooks_name_owner(r, owner, how);
			return;
		}
	}
	if (r->proto == IPPROTO_TCP) {
		/*
		 * SYN cookies, Fast Open: a child that never was a request. Or
		 * its listener closed and left it to another (tcp_migrate_req).
		 * Or the kernel accepted it, and gave it a file (nvmet).
		 */
		listener = sniffer_lookup_listener(flow, r->dir == SNIFFER_DIR_OUT);
		if (listener && hooks_is_servers(listener)) {
			hooks_name_kernel(r);
			return;
		}
		young = full && (!r->inode || grafted) && sk->sk_state != TCP_CLOSE;
		other = young && listener ? hooks_find(listener) : NULL;
		/* one that a kernel's server stops using, and had from him, is his no more */
		if (other && hooks_is_held(other)) {
			hooks_name_acceptor(r, other);
			return;
		}
	}
	if (gone)
		hooks_name_acceptor(r, gone);
	else
		r->how = hooks_reason(sk, fresh);
}

/*
 * The connection that this CPU's stack resets: with a socket of its own, and
 * after this one has left the tables that could be searched for it. Written by
 * the tracepoint right before the packet leaves, interrupts off; read and
 * emptied by the hook that meets it, preemption off.
 */
struct hooks_reset {
	u64 cookie;
	bool listens;
	__be16 sport, dport;
	u8 saddr[16], daddr[16];	/* of the packet that is answered */
};

static DEFINE_PER_CPU(struct hooks_reset, hooks_resets);

/**
 * sniffer_hooks_reset - the stack answers a packet with a reset
 * @sk: for this full socket
 * @skb: the packet, its transport header set
 */
void sniffer_hooks_reset(struct sock *sk, const struct sk_buff *skb)
{
	const struct tcphdr *th = tcp_hdr(skb);
	struct hooks_reset reset = {
		.cookie = atomic64_read(&sk->sk_cookie), .listens = sk->sk_state == TCP_LISTEN,
		.sport = th->source, .dport = th->dest,
	};
	unsigned long flags;

	if (ip_hdr(skb)->version == 4) {
		memcpy(reset.saddr, &ip_hdr(skb)->saddr, 4);
		memcpy(reset.daddr, &ip_hdr(skb)->daddr, 4);
	} else {
		memcpy(reset.saddr, &ipv6_hdr(skb)->saddr, 16);
		memcpy(reset.daddr, &ipv6_hdr(skb)->daddr, 16);
	}
	local_irq_save(flags);
	*this_cpu_ptr(&hooks_resets) = reset;
	local_irq_restore(flags);
}

/* Names a reset after the socket that the tracepoint has just told. */
static bool hooks_name_reset(struct sniffer_record *r)
{
	struct hooks_reset *reset = get_cpu_ptr(&hooks_resets);
	bool listens = reset->listens;
	const struct sniffer_owner *owner = NULL;

	if (reset->cookie && ntohs(reset->sport) == r->dport && ntohs(reset->dport) == r->sport &&
	    !memcmp(reset->saddr, r->daddr, 16) && !memcmp(reset->daddr, r->saddr, 16)) {
		owner = sniffer_owner_find(reset->cookie);
		reset->cookie = 0;
	}
	put_cpu_ptr(&hooks_resets);
	/* pairs with sniffer_owner_gain(): no listener to ask, hence a user */
	if (!owner || smp_load_acquire(&owner->via) || !rcu_access_pointer(owner->user))
		return false;
	r->cookie = owner->cookie;
	hooks_name_owner(r, owner, SNIFFER_HOW_REVERSE);
	/* any of them could have accepted what is refused */
	if (listens && r->flags & SNIFFER_F_SHARED)
		r->flags |= SNIFFER_F_AMBIGUOUS;
	return true;
}

/*
 * A packet without a socket, or with one that the stack answers with: who is it for?
 * Netfilter makes packets without any (a firewall's reset, a copy), and IPVS
 * sends on what came in; of the stack's own only the SYN-ACKs of SYN cookies
 * are such, IPv4's. Anybody could listen on the port of a foreign address.
 */
static void hooks_name_answer(struct sniffer_flow *flow, const struct nf_hook_state *state,
			      const struct sock *sk)
{
	const u8 both = TCPHDR_SYN | TCPHDR_ACK;
	struct sniffer_record *r = &flow->record;
	struct sniffer_record shown;
	struct sock *found;
	bool put;

	r->how = SNIFFER_HOW_NO_SOCKET;
	if (!sk) {
		bool local = sniffer_lookup_is_local(flow, state->out);

		if (!local && flow->skb->skb_iif) {
			r->dir = SNIFFER_DIR_FWD;
			r->how = SNIFFER_HOW_FORWARDED;
		}
		if (!local || r->proto != IPPROTO_TCP || (r->tcp_flags & both) != both)
			return;
	} else if (r->proto == IPPROTO_UDP) {
		hooks_name_kernel(r);
		return;
	}
	shown = *r;
	sniffer_lookup_untranslate(flow);
	if (!sk || !(r->tcp_flags & TCPHDR_RST) || !hooks_name_reset(r)) {
		found = sniffer_lookup_reverse(flow);
		put = found;
		if (!found)
			found = sniffer_lookup_listener(flow, true);
		if (found)
			hooks_name_socket(flow, found, SNIFFER_HOW_REVERSE);
		if (put)
			sniffer_lookup_put(found);
	}
	memcpy(r->saddr, shown.saddr, sizeof(r->saddr));
	memcpy(r->daddr, shown.daddr, sizeof(r->daddr));
	r->sport = shown.sport;
	r->dport = shown.dport;
}

/*
 * Is this UDP the kernel's wrapping around a packet, whose sender @sk still is?
 * A socket that is closed while its packet waits (NFQUEUE) has no port any more.
 */
static bool hooks_is_wrapped(const struct sniffer_record *r, const struct sock *sk)
{
	if (r->proto != IPPROTO_UDP)
		return false;
	if (!sk_fullsock(sk) || (sk->sk_family != AF_INET && sk->sk_family != AF_INET6))
		return true;
	if (sk->sk_type == SOCK_RAW)
		return false;
	return sk->sk_protocol != IPPROTO_UDP ||
	       (inet_sk(sk)->inet_num && inet_sk(sk)->inet_num != r->sport);
}

static void hooks_out(struct sniffer_flow *flow, const struct nf_hook_state *state, bool trusted)
{
	struct sniffer_record *r = &flow->record;
	const struct sniffer_owner *owner;
	const struct sniffer_proc *user;
	struct sock *sk = flow->skb->sk;

	/*
	 * Tunnels leave the inner sender in skb->sk and say with state->sk, if
	 * at all, whose the packet is; IPv6 says there the listener of a SYN
	 * cookie, but also whose packet a firewall answers with a reset.
	 */
	if (!sk || (state->sk && r->proto == IPPROTO_UDP)) {
		trusted &= sk == state->sk;
		sk = state->sk;
		if (sk && r->proto == IPPROTO_TCP && sk_fullsock(sk) &&
		    sk->sk_state != TCP_LISTEN && !hooks_is_kernel(sk))
			sk = NULL;
	}
	if (!sk || (sk_fullsock(sk) && hooks_is_kernel(sk))) {
		if (sk && sk->sk_type == SOCK_STREAM)
			hooks_name_socket(flow, sk, SNIFFER_HOW_SOCKET);
		else
			hooks_name_answer(flow, state, sk);
		return;
	}
	if (hooks_is_wrapped(r, sk)) {
		hooks_name_kernel(r);
		return;
	}
	/* ipvlan takes the packet of another namespace on its way through this one */
	if (!net_eq(sock_net(sk), state->net)) {
		r->dir = SNIFFER_DIR_FWD;
		r->how = SNIFFER_HOW_FORWARDED;
		return;
	}
	if (!trusted || !sk_fullsock(sk) || sk->sk_state == TCP_LISTEN ||
	    !sniffer_use(sk, false)) {
		hooks_name_socket(flow, sk, SNIFFER_HOW_SOCKET);
		return;
	}

	/* The sender is on the CPU: nobody can know better. */
	r->how = SNIFFER_HOW_CONTEXT;
	r->cookie = sniffer_owner_cookie(sk);
	r->inode = sniffer_owner_inode(sk);
	r->tgid = current->tgid;
	r->tid = current->pid;
	r->start_ns = current->group_leader->start_boottime;
	r->uid = __kuid_val(current_uid());
	sniffer_process_comm(r->comm, current->group_leader->comm);
	owner = sniffer_owner_find(r->cookie);
	user = owner ? rcu_dereference(owner->user) : NULL;
	if (user)
		hooks_add_facts(r, owner, user);
}

static void hooks_record(struct sniffer_flow *flow)
{
	sniffer_batch_add(&flow->record);
	if (sniffer_netlink_snapping() && !(flow->record.flags & SNIFFER_F_COPY))
		sniffer_batch_snap(&flow->record, flow->skb);
}

static void hooks_in_multicast(struct sniffer_flow *flow)
{
	const struct sniffer_record plain = flow->record;
	struct sock *sk = sniffer_lookup_multicast(flow, NULL);

	if (!sk) {
		flow->record.how = SNIFFER_HOW_NO_SOCKET;
		hooks_record(flow);
		return;
	}
	for (; sk; sk = sniffer_lookup_multicast(flow, sk)) {
		hooks_name_socket(flow, sk, SNIFFER_HOW_SOCKET);
		hooks_record(flow);
		flow->record = plain;
		flow->record.flags = SNIFFER_F_COPY;
	}
}

static void hooks_in(struct sniffer_flow *flow)
{
	struct sock *sk;
	bool put;

	sk = sniffer_lookup_in(flow, &put);
	if (!sk) {
		flow->record.how = SNIFFER_HOW_NO_SOCKET;
		return;
	}
	hooks_name_socket(flow, sk, SNIFFER_HOW_SOCKET);
	if (put)
		sniffer_lookup_put(sk);
}

static unsigned int hooks_packet(struct sk_buff *skb, const struct nf_hook_state *state, u8 family,
				 u8 dir)
{
	/* as the stack reads it: ipvlan has brought the packet to its namespace by now */
	const struct net_device *dev = dir == SNIFFER_DIR_IN ? skb->dev : state->out;
	struct net *net = dir == SNIFFER_DIR_IN ? dev_net(skb->dev) : state->net;
	struct sniffer_flow flow;

	if (!sniffer_netlink_listening()) {
		sniffer_batch_skip(SNIFFER_SKIP_LISTENER);
		return NF_ACCEPT;
	}
	/* A VRF shows its slaves' packets twice: wait for the second time. */
	if (dir == SNIFFER_DIR_OUT && dev && netif_is_l3_master(dev) && skb_dst(skb) &&
	    skb_dst(skb)->dev != dev) {
		sniffer_batch_skip(SNIFFER_SKIP_OTHER);
		return NF_ACCEPT;
	}
	memset(&flow, 0, sizeof(flow));
	flow.net = net;
	flow.skb = skb;
	flow.record.family = family;
	flow.record.dir = dir;
	if (!hooks_parse(&flow))
		return NF_ACCEPT;

	flow.record.time_ns = ktime_get_ns();
	flow.record.netns = net->ns.inum;
	flow.record.ifindex = dev ? dev->ifindex : 0;

	if (dir == SNIFFER_DIR_OUT) {
		hooks_out(&flow, state, hooks_trust_current());
	} else if (dir == SNIFFER_DIR_FWD) {
		flow.record.how = SNIFFER_HOW_FORWARDED;
	} else if (flow.record.proto == IPPROTO_UDP && !skb->sk &&
		   sniffer_lookup_is_multicast(&flow)) {
		hooks_in_multicast(&flow);
		return NF_ACCEPT;	/* recorded, once a receiver */
	} else {
		hooks_in(&flow);
	}
	hooks_record(&flow);
	return NF_ACCEPT;
}

#define HOOKS_FUNCTION(name, family, dir)						\
static unsigned int name(void *priv, struct sk_buff *skb, const struct nf_hook_state *state) \
{											\
	return hooks_packet(skb, state, family, dir);					\
}

HOOKS_FUNCTION(hooks_in4, AF_INET, SNIFFER_DIR_IN)
HOOKS_FUNCTION(hooks_out4, AF_INET, SNIFFER_DIR_OUT)
HOOKS_FUNCTION(hooks_fwd4, AF_INET, SNIFFER_DIR_FWD)
HOOKS_FUNCTION(hooks_in6, AF_INET6, SNIFFER_DIR_IN)
HOOKS_FUNCTION(hooks_out6, AF_INET6, SNIFFER_DIR_OUT)
HOOKS_FUNCTION(hooks_fwd6, AF_INET6, SNIFFER_DIR_FWD)

#define HOOKS_ENTRY(function, family, number)	\
	{ .hook = function, .pf = family, .hooknum = number, .priority = NF_IP_PRI_LAST }

static const struct nf_hook_ops hooks_ops[] = {
	HOOKS_ENTRY(hooks_in4, NFPROTO_IPV4, NF_INET_LOCAL_IN),
	HOOKS_ENTRY(hooks_out4, NFPROTO_IPV4, NF_INET_LOCAL_OUT),
	HOOKS_ENTRY(hooks_fwd4, NFPROTO_IPV4, NF_INET_FORWARD),
	HOOKS_ENTRY(hooks_in6, NFPROTO_IPV6, NF_INET_LOCAL_IN),
	HOOKS_ENTRY(hooks_out6, NFPROTO_IPV6, NF_INET_LOCAL_OUT),
	HOOKS_ENTRY(hooks_fwd6, NFPROTO_IPV6, NF_INET_FORWARD),
};

static int __net_init hooks_net_init(struct net *net)
{
	return nf_register_net_hooks(net, hooks_ops, ARRAY_SIZE(hooks_ops));
}

static void __net_exit hooks_net_exit(struct net *net)
{
	nf_unregister_net_hooks(net, hooks_ops, ARRAY_SIZE(hooks_ops));
}

static struct pernet_operations hooks_net_ops = {
	.init = hooks_net_init,
	.exit = hooks_net_exit,
};

int sniffer_hooks_init(void)
{
	return register_pernet_subsys(&hooks_net_ops);
}

void sniffer_hooks_exit(void)
{
	unregister_pernet_subsys(&hooks_net_ops);
	synchronize_net();
}

// SPDX-License-Identifier: GPL-2.0-only
/* Which process owns a packet? From its socket to the second half of its record. */
#include <linux/netfilter.h>
#include <linux/tcp.h>
#include <net/mptcp.h>
#include <net/net_namespace.h>
#include <net/request_sock.h>
#include <net/tcp.h>

#include "alive.h"
#include "compat.h"
#include "lookup.h"
#include "name.h"
#include "owner.h"
#include "process.h"
#include "reset.h"
#include "use.h"
#include "waiter.h"

/* Has a server in the kernel set the user data? BPF maps mark theirs with the low bits. */
static bool name_has_server(const struct sock *sk)
{
	unsigned long data = (unsigned long)READ_ONCE(sk->sk_user_data);

	return data && !(data & 7);
}

/*
 * Does a server in the kernel accept from this listener? It is the server's own, or a
 * process has handed it over (knfsd), and may have closed it since.
 */
static bool name_is_servers(const struct sock *sk)
{
	return sniffer_owner_is_kernels(sk) || (sk->sk_state == TCP_LISTEN && name_has_server(sk));
}

/*
 * Is this flagged socket a plain TCP connection that waits to be accepted from an MPTCP
 * listener? It is a copy of the listener's subflow, with its flag.
 */
static bool name_is_fallback(struct sniffer_flow *flow, const struct sock *sk)
{
	struct sock *listener;

	if (flow->record.proto != IPPROTO_TCP || READ_ONCE(sk->sk_socket))
		return false;
	if (sniffer_owner_find(atomic64_read(&sk->sk_cookie)))
		return true;
	listener = sniffer_lookup_listener(flow, flow->record.dir == SNIFFER_DIR_OUT);
	return listener && !name_is_servers(listener);
}

/* The kernel itself sends or receives the packet. */
static void name_kernel(struct sniffer_record *r)
{
	r->how = SNIFFER_HOW_KERNEL;
	r->flags |= SNIFFER_F_KERNEL;
}

static void name_add_facts(struct sniffer_record *r, const struct sniffer_owner *owner,
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

/* Names @r after @owner's user, and adds what the table knows of the socket. Under RCU. */
static void name_owner(struct sniffer_record *r, const struct sniffer_owner *owner, u8 how)
{
	const struct sniffer_proc *user = rcu_dereference(owner->user);

	r->how = how;
	r->tgid = user->tgid;
	r->start_ns = user->start_ns;
	r->uid = READ_ONCE(user->uid);
	r->tid = READ_ONCE(owner->tid);
	memcpy(r->comm, user->comm, SNIFFER_COMM_LEN);
	name_add_facts(r, owner, user);
}

/* Finds an entry with a user for @sk: by cookie, else by inode (MPTCP). */
static const struct sniffer_owner *name_find(struct sock *sk)
{
	const struct sniffer_owner *owner = sniffer_owner_find(sniffer_owner_cookie(sk));
	u64 inode;

	if (!owner || !rcu_access_pointer(owner->user)) {
		inode = sniffer_owner_inode(sk);
		owner = inode ? sniffer_owner_find_inode(inode) : NULL;
	}
	return owner && rcu_access_pointer(owner->user) ? owner : NULL;
}

static bool name_is_held(const struct sniffer_owner *owner)
{
	const struct sniffer_proc *user = rcu_dereference(owner->user);

	return user && sniffer_owner_held(owner, user);
}

/* Names @r after the process that would accept the connection. */
static void name_acceptor(struct sniffer_record *r, const struct sniffer_owner *listener)
{
	name_owner(r, listener, SNIFFER_HOW_LISTENER);
	if (r->flags & SNIFFER_F_SHARED)
		r->flags |= SNIFFER_F_AMBIGUOUS;
}

/* Why does the table not know @sk? @fresh: no probe has ever seen it. */
static u8 name_reason(const struct sock *sk, bool fresh)
{
	bool full = sk_fullsock(sk);

	/* perhaps the table was full when the socket came */
	if (!fresh && sniffer_probes_alive() && sniffer_owner_is_full())
		return SNIFFER_HOW_TABLE_FULL;
	if (!full || (sk->sk_state != TCP_LISTEN && sock_flag(sk, SOCK_DEAD)))
		return fresh ? SNIFFER_HOW_PREDATES : SNIFFER_HOW_SOCKET_GONE;
	if (!sniffer_probes_alive())
		return SNIFFER_HOW_NOT_PROBED;
	return sniffer_owner_full() ? SNIFFER_HOW_TABLE_FULL : SNIFFER_HOW_PREDATES;
}

/* Names a packet of a handshake: the connection is no full socket yet. */
static void name_request(struct sniffer_record *r, struct sock *sk, bool fresh)
{
	struct sock *listener = inet_reqsk(sk)->rsk_listener;
	const struct sniffer_owner *owner;

	if (!listener) {
		r->how = SNIFFER_HOW_SOCKET_GONE;
		return;
	}
	if (name_is_servers(listener)) {
		name_kernel(r);
		return;
	}
	owner = name_find(listener);
	if (!owner) {
		r->how = name_reason(listener, fresh);
		return;
	}
	if (r->dir == SNIFFER_DIR_IN && r->tcp_flags & TCPHDR_ACK && !(r->tcp_flags & TCPHDR_RST))
		sniffer_owner_refer(sk, owner->cookie, SNIFFER_HOW_LISTENER);
	name_acceptor(r, owner);
}

/* Names a packet of a listener itself. */
static void name_listener(struct sniffer_record *r, struct sock *sk, bool fresh)
{
	const struct sniffer_owner *owner = name_find(sk);

	if (owner)
		name_acceptor(r, owner);
	else
		r->how = name_reason(sk, fresh);
}

/* Names @r after another entry with the inode of @sk. False if there is none. */
static bool name_by_inode(struct sniffer_record *r, struct sock *sk)
{
	const struct sniffer_owner *other = sniffer_owner_find_inode(r->inode);

	if (!other || !rcu_access_pointer(other->user))
		return false;
	sniffer_owner_refer(sk, other->cookie, SNIFFER_HOW_INODE);
	name_owner(r, other, SNIFFER_HOW_INODE);
	return true;
}

/*
 * Names @r after the listener or MPTCP parent @via that the entry @owner of @sk refers
 * to. A listener that may be gone goes to @gone instead.
 */
static bool name_by_via(struct sniffer_record *r, const struct sock *sk,
			const struct sniffer_owner *owner, u64 via,
			const struct sniffer_owner **gone)
{
	const struct sniffer_owner *other = sniffer_owner_find(via);

	if (!other || !rcu_access_pointer(other->user))
		return false;
	if (READ_ONCE(owner->via_how) != SNIFFER_HOW_LISTENER) {
		name_owner(r, other, SNIFFER_HOW_INODE);
		return true;
	}
	/* a listener is freed, and marked dead, only after a grace period */
	if (!sk_fullsock(sk) || sock_flag(sk, SOCK_DEAD) ||
	    (name_is_held(other) && !READ_ONCE(other->dead))) {
		name_acceptor(r, other);
		return true;
	}
	*gone = other;
	return false;
}

/*
 * Looks for a listener that has room for the connection @sk. The connection never was a
 * request (SYN cookie, Fast Open). Or its listener closed and left it to another
 * (tcp_migrate_req). Or the kernel accepted it and gave it a file (nvmet). @waits: the
 * full socket @sk may still wait to be accepted.
 */
static bool name_by_listener(struct sniffer_flow *flow, const struct sock *sk, bool waits)
{
	struct sniffer_record *r = &flow->record;
	struct sock *listener = sniffer_lookup_listener(flow, r->dir == SNIFFER_DIR_OUT);
	const struct sniffer_owner *owner;

	if (listener && name_is_servers(listener)) {
		name_kernel(r);
		return true;
	}
	owner = waits && sk->sk_state != TCP_CLOSE && listener ? name_find(listener) : NULL;
	/* its process may have handed it to a server in the kernel, and closed it */
	if (!owner || !name_is_held(owner))
		return false;
	name_acceptor(r, owner);
	return true;
}

/*
 * Is accept() on another CPU giving @sk its socket right now? Then @sk has its inode,
 * but the probe may not have entered its owner yet.
 */
static bool name_is_grafted_now(struct sock *sk)
{
	bool busy;

	local_bh_disable();
	/* sock_graft() holds this lock while it calls the function that we probe */
	busy = !read_trylock(&sk->sk_callback_lock);
	if (!busy)
		read_unlock(&sk->sk_callback_lock);
	local_bh_enable();
	return busy;
}

/* Notes what the packet was named after, so that memo.c can repeat it. */
static void name_note(struct sniffer_flow *flow, const struct sock *sk, struct sniffer_owner *owner,
		      unsigned int version)
{
	flow->sk = sk;
	flow->owner = owner;
	flow->version = version;
}

/**
 * sniffer_name_socket - name a packet after the owner of its socket
 * @flow: the packet; its record gets a name, or a reason in its field how
 * @sk: the socket, of any kind
 * @how: SNIFFER_HOW_SOCKET or SNIFFER_HOW_REVERSE: how @sk was found
 *
 * In order: the kernel itself; a handshake or a listener; the socket's entry by its
 * cookie; an entry by its inode; the listener or MPTCP parent that the entry refers to;
 * a listener with room for the connection. What none of these names gets a reason.
 */
void sniffer_name_socket(struct sniffer_flow *flow, struct sock *sk, u8 how)
{
	struct sniffer_record *r = &flow->record;
	bool fresh = !atomic64_read(&sk->sk_cookie);
	const struct sniffer_owner *gone = NULL;
	struct sniffer_owner *owner;
	bool full = sk_fullsock(sk);
	bool grafted = false;
	unsigned int version;
	u64 via;

	if (full && name_is_servers(sk) && !name_is_fallback(flow, sk)) {
		name_kernel(r);
		return;
	}
	r->cookie = sniffer_owner_cookie(sk);
	if (sk->sk_state == TCP_NEW_SYN_RECV) {
		name_request(r, sk, fresh);
		return;
	}
	if (full)
		r->inode = sniffer_owner_inode(sk);
	if (full && sk->sk_state == TCP_LISTEN) {
		name_listener(r, sk, fresh);
		return;
	}

	version = sniffer_owner_version(sniffer_owner_stripe(r->cookie));
	owner = sniffer_owner_find(r->cookie);
	/*
	 * a server in the kernel receives these datagrams, and the process that handed
	 * the socket over has closed it
	 */
	if (owner && (READ_ONCE(owner->server) || (full && name_has_server(sk))) &&
	    !name_is_held(owner)) {
		name_kernel(r);
		return;
	}
	/* read once: accept() may clear it meanwhile, after it has set the user */
	via = owner ? smp_load_acquire(&owner->via) : 0;
	if (owner && !via && rcu_access_pointer(owner->user)) {
		name_owner(r, owner, how);
		if (r->proto == IPPROTO_UDP && r->dir == SNIFFER_DIR_IN &&
		    r->flags & SNIFFER_F_SHARED)
			sniffer_waiter_name(r, sk);
		else if (full)
			name_note(flow, sk, owner, version);
		return;
	}
	if (r->inode && name_by_inode(r, sk))
		return;
	if (via && name_by_via(r, sk, owner, via, &gone))
		return;
	if (full && r->inode && r->proto == IPPROTO_TCP) {
		grafted = name_is_grafted_now(sk);
		owner = grafted ? NULL : sniffer_owner_find(r->cookie);
		/* the entry may be there by now. Pairs with sniffer_owner_gain() */
		if (owner && !smp_load_acquire(&owner->via) && rcu_access_pointer(owner->user)) {
			name_owner(r, owner, how);
			return;
		}
	}
	if (r->proto == IPPROTO_TCP && name_by_listener(flow, sk, full && (!r->inode || grafted)))
		return;
	if (gone)
		name_acceptor(r, gone);
	else
		r->how = name_reason(sk, fresh);
}

/* Names a reset after the socket that the tracepoint has just reported. */
static bool name_reset(struct sniffer_record *r)
{
	bool listens;
	u64 cookie = sniffer_reset_take(r, &listens);
	const struct sniffer_owner *owner = cookie ? sniffer_owner_find(cookie) : NULL;

	/* no listener counts, so there is a user. Pairs with sniffer_owner_gain() */
	if (!owner || smp_load_acquire(&owner->via) || !rcu_access_pointer(owner->user))
		return false;
	r->cookie = owner->cookie;
	name_owner(r, owner, SNIFFER_HOW_REVERSE);
	/* each of the holders could have accepted the connection that is refused */
	if (listens && r->flags & SNIFFER_F_SHARED)
		r->flags |= SNIFFER_F_AMBIGUOUS;
	return true;
}

/*
 * Names the connection of a packet without a socket. The socket that the stack uses
 * for all its answers counts as none. Packets without a socket are
 * - Netfilter's: a firewall's reset, a copy;
 * - those that IPVS forwards;
 * - SYN-ACKs of IPv4 SYN cookies.
 * A foreign address is not looked up: anybody here may listen on that port.
 */
static void name_answer(struct sniffer_flow *flow, const struct nf_hook_state *state,
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
		name_kernel(r);
		return;
	}
	shown = *r;
	sniffer_lookup_untranslate(flow);
	if (!sk || !(r->tcp_flags & TCPHDR_RST) || !name_reset(r)) {
		found = sniffer_lookup_reverse(flow);
		put = found;
		if (!found)
			found = sniffer_lookup_listener(flow, true);
		if (found)
			sniffer_name_socket(flow, found, SNIFFER_HOW_REVERSE);
		if (put)
			sniffer_lookup_put(found);
	}
	memcpy(r->saddr, shown.saddr, sizeof(r->saddr));
	memcpy(r->daddr, shown.daddr, sizeof(r->daddr));
	r->sport = shown.sport;
	r->dport = shown.dport;
}

/*
 * Does the kernel wrap this UDP around a packet whose sender @sk still is? A socket
 * without a port is no such case: it was closed while its packet waited (NFQUEUE).
 */
static bool name_is_wrapped(const struct sniffer_record *r, const struct sock *sk)
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

/**
 * sniffer_name_out - name a packet at LOCAL_OUT
 * @flow: the packet; its record is filled in
 * @state: state of the hook
 * @trusted: current may be taken for the sender
 */
void sniffer_name_out(struct sniffer_flow *flow, const struct nf_hook_state *state, bool trusted)
{
	struct sniffer_record *r = &flow->record;
	const struct sniffer_proc *user;
	struct sock *sk = flow->skb->sk;
	struct sniffer_found found;
	struct sniffer_owner *owner;

	/*
	 * A tunnel leaves the inner sender in skb->sk. Its own socket is in state->sk, if
	 * anywhere. For IPv6, state->sk may also be the listener of a SYN cookie. Or it is
	 * the socket of a packet that a firewall answers with a reset.
	 */
	if (!sk || (state->sk && r->proto == IPPROTO_UDP)) {
		trusted &= sk == state->sk;
		sk = state->sk;
		if (sk && r->proto == IPPROTO_TCP && sk_fullsock(sk) &&
		    sk->sk_state != TCP_LISTEN && !sniffer_owner_is_kernels(sk))
			sk = NULL;
	}
	if (!sk || (sk_fullsock(sk) && sniffer_owner_is_kernels(sk))) {
		if (sk && sk->sk_type == SOCK_STREAM)
			sniffer_name_socket(flow, sk, SNIFFER_HOW_SOCKET);
		else
			name_answer(flow, state, sk);
		return;
	}
	if (name_is_wrapped(r, sk)) {
		name_kernel(r);
		return;
	}
	/* ipvlan: the packet of another namespace on its way through this one */
	if (!net_eq(sock_net(sk), state->net)) {
		r->dir = SNIFFER_DIR_FWD;
		r->how = SNIFFER_HOW_FORWARDED;
		return;
	}
	if (!trusted || !sk_fullsock(sk) || sk->sk_state == TCP_LISTEN ||
	    !sniffer_use(sk, false, &found)) {
		sniffer_name_socket(flow, sk, SNIFFER_HOW_SOCKET);
		return;
	}

	/* The sender itself is on the CPU: the best source there is. */
	r->how = SNIFFER_HOW_CONTEXT;
	r->cookie = sniffer_owner_cookie(sk);
	r->inode = sniffer_owner_inode(sk);
	r->tgid = current->tgid;
	r->tid = current->pid;
	r->start_ns = current->group_leader->start_boottime;
	r->uid = __kuid_val(current_uid());
	sniffer_comm_copy(r->comm, current->group_leader->comm);
	owner = found.owner;
	user = owner ? rcu_dereference(owner->user) : NULL;
	if (!user)
		return;
	name_add_facts(r, owner, user);
	if (!READ_ONCE(owner->via) && !READ_ONCE(owner->guess) && sniffer_process_is(user, current))
		name_note(flow, sk, owner, found.version);
}

// SPDX-License-Identifier: GPL-2.0-only
/*
 * Decides when send and receive calls are probed. While nobody listens, a packet costs
 * one counter, and these calls cost nothing. They show who used a socket last, which
 * matters only where several processes have it. So they are probed while somebody
 * listens, and while sockets stay shared, for a reader that comes later.
 *
 * When the probes are armed, the last user of a shared socket is not certain. Records
 * say so (AMBIGUOUS) until somebody uses the socket. A process that is in a call on the
 * socket at that moment is named.
 */
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/workqueue.h>

#include "alive.h"
#include "listen.h"
#include "netlink.h"
#include "owner.h"
#include "probes.h"
#include "process.h"
#include "seed.h"

#define LISTEN_LINGER	(5 * HZ)	/* time for which a reader may come back */
#define LISTEN_LOOK	2		/* seconds between two looks for shared sockets */
#define LISTEN_LOOK_LONG 16		/* the same while some are shared */

/* Guards all below, and arming and disarming. Process context. */
static DEFINE_MUTEX(listen_lock);
static bool listen_told;		/* send and receive calls are probed */
static bool listen_shared;		/* sockets have been shared for longer than one interval */
static unsigned int listen_seen;	/* consecutive looks that found shared sockets */
static u64 listen_clock;		/* sniffer_owner_clock() of the last look */
static unsigned long listen_until;	/* jiffies */
static bool listen_ended;		/* the module is being unloaded */

static void listen_tick(struct work_struct *work);
static DECLARE_DELAYED_WORK(listen_ticker, listen_tick);
static void listen_joined(struct work_struct *work);
static DECLARE_DELAYED_WORK(listen_joiner, listen_joined);

/* Under the entry's lock. May another process use the socket unseen? */
static bool listen_may_miss(const struct sniffer_owner *owner)
{
	const struct sniffer_proc *user = rcu_dereference_protected(owner->user, true);

	return user && owner->held && !owner->via && !owner->dead && !owner->listens &&
	       sniffer_owner_shared(owner, user);
}

/* Is there a socket whose last user may be missed? If @doubt, all such sockets are flagged. */
static bool listen_look(bool doubt)
{
	struct sniffer_owner *owner;
	struct hlist_head *bucket;
	raw_spinlock_t *lock;
	unsigned long flags;
	bool found = false;
	unsigned int i;

	for (i = 0; (bucket = sniffer_owner_bucket(i, &lock)); i++) {
		if (!(i % 1024))
			cond_resched();
		if (hlist_empty(bucket))
			continue;
		raw_spin_lock_irqsave(lock, flags);
		sniffer_owner_change(lock);
		hlist_for_each_entry(owner, bucket, by_cookie) {
			if (!listen_may_miss(owner))
				continue;
			found = true;
			if (doubt)
				WRITE_ONCE(owner->guess, true);
		}
		sniffer_owner_changed(lock);
		raw_spin_unlock_irqrestore(lock, flags);
		if (found && !doubt)
			break;
	}
	return found;
}

/* Under listen_lock. */
static void listen_tell(bool on)
{
	if (listen_told == on)
		return;
	listen_told = on;
	if (!sniffer_probes_tell_messages(on) && on)
		pr_warn_once("sniffer: send and receive calls cannot be probed: users of shared sockets may be unknown\n");
	if (on && listen_look(true))
		sniffer_seed_calls();
}

/**
 * sniffer_listen_update - arm or disarm by who has joined or left
 *
 * Process context. When it returns, packets are recorded if somebody listens.
 */
void sniffer_listen_update(void)
{
	bool wanted;

	mutex_lock(&listen_lock);
	wanted = !listen_ended && (sniffer_netlink_listening(SNIFFER_GROUP_INDEX_PACKETS) ||
				   sniffer_netlink_listening(SNIFFER_GROUP_INDEX_FLOWS));
	if (wanted) {
		listen_until = jiffies + LISTEN_LINGER;
		listen_tell(true);
		static_branch_enable(&sniffer_listening);
	} else {
		static_branch_disable(&sniffer_listening);
		if (time_after(jiffies, listen_until) || listen_ended)
			listen_tell(listen_shared && !listen_ended);
	}
	mutex_unlock(&listen_lock);
}

/*
 * The cost of a look grows with the table. So look only after a fork, or while
 * something is shared.
 */
static void listen_follow_sharing(void)
{
	static unsigned int ticks;
	u64 clock = sniffer_owner_clock();

	if (++ticks % (listen_shared ? LISTEN_LOOK_LONG : LISTEN_LOOK))
		return;
	mutex_lock(&listen_lock);
	if (clock != listen_clock || listen_seen) {
		listen_clock = clock;
		listen_seen = listen_look(false) ? listen_seen + 1 : 0;
		listen_shared = listen_seen > 1;
	}
	mutex_unlock(&listen_lock);
}

static void listen_tick(struct work_struct *work)
{
	listen_follow_sharing();
	sniffer_listen_update();
	schedule_delayed_work(&listen_ticker, HZ);
}

static void listen_joined(struct work_struct *work)
{
	sniffer_listen_update();
}

/* A process is about to join a group. Readers that flush do not depend on this. */
static void listen_join(void)
{
	mod_delayed_work(system_wq, &listen_joiner, 1);
}

void sniffer_listen_init(void)
{
	sniffer_probes_tell_joins(listen_join);
	schedule_delayed_work(&listen_ticker, HZ);
}

/* A reader that still flushes gets an answer, but no packet. */
void sniffer_listen_exit(void)
{
	sniffer_probes_tell_joins(NULL);
	/* wait until the last handler has returned */
	synchronize_rcu();
	cancel_delayed_work_sync(&listen_joiner);
	cancel_delayed_work_sync(&listen_ticker);
	mutex_lock(&listen_lock);
	listen_ended = true;
	mutex_unlock(&listen_lock);
	sniffer_listen_update();
}

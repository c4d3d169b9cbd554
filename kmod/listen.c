// SPDX-License-Identifier: GPL-2.0-only
/*
 * While nobody listens a packet costs a counter, and send and receive calls
 * nothing. They tell who used a socket last, which matters only where several
 * processes have it. So they are told while somebody listens, and while such
 * sharing lasts, for a reader that comes later.
 *
 * When they begin to be told, who used a shared socket last is not known for
 * certain: records say so (AMBIGUOUS) until somebody uses it. Who is in a call on
 * it right then is named.
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

#define LISTEN_LINGER	(5 * HZ)	/* for a reader that comes back */
#define LISTEN_LOOK	2		/* seconds from look to look whether sockets are shared */
#define LISTEN_LOOK_LONG 16		/* the same while it is known that some are */

/* Guards all below, and starting and stopping. Process context. */
static DEFINE_MUTEX(listen_lock);
static bool listen_told;		/* send and receive calls are told */
static bool listen_shared;		/* sockets are shared, for longer than from look to look */
static unsigned int listen_seen;	/* looks in a row that found shared ones */
static u64 listen_clock;		/* sniffer_owner_clock() of the last look */
static unsigned long listen_until;	/* jiffies */
static bool listen_ended;		/* the module goes */

static void listen_tick(struct work_struct *work);
static DECLARE_DELAYED_WORK(listen_ticker, listen_tick);
static void listen_joined(struct work_struct *work);
static DECLARE_DELAYED_WORK(listen_joiner, listen_joined);

/* Under the entry's lock. May another process than its user use the socket unseen? */
static bool listen_may_miss(const struct sniffer_owner *owner)
{
	const struct sniffer_proc *user = rcu_dereference_protected(owner->user, true);

	return user && owner->held && !owner->via && !owner->dead && !owner->listens &&
	       sniffer_owner_shared(owner, user);
}

/* Are there sockets whose last user may be missed? If @doubt, all of them are flagged so. */
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
		pr_warn_once("sniffer: who sends and receives cannot be told: users of shared sockets may be unknown\n");
	if (on && listen_look(true))
		sniffer_seed_calls();
}

/**
 * sniffer_listen_update - follow who has joined or left
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

/* A look costs as much as the table is long: only after a fork, or while something is shared. */
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

/* A process joins a group, but has not done so yet. A reader that flushes does not depend on it. */
static void listen_join(void)
{
	mod_delayed_work(system_wq, &listen_joiner, 1);
}

void sniffer_listen_init(void)
{
	sniffer_probes_tell_joins(listen_join);
	schedule_delayed_work(&listen_ticker, HZ);
}

/* Who still flushes gets an answer, but no packet. */
void sniffer_listen_exit(void)
{
	sniffer_probes_tell_joins(NULL);
	/* until the last one that is told has gone */
	synchronize_rcu();
	cancel_delayed_work_sync(&listen_joiner);
	cancel_delayed_work_sync(&listen_ticker);
	mutex_lock(&listen_lock);
	listen_ended = true;
	mutex_unlock(&listen_lock);
	sniffer_listen_update();
}

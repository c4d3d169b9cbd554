// SPDX-License-Identifier: GPL-2.0-only
/* Once a second, removes sockets and processes that ended some time ago. */
#include <linux/workqueue.h>

#include "alive.h"
#include "collect.h"
#include "holders.h"
#include "owner.h"
#include "process.h"

#define COLLECT_KEEP	(2 * HZ)	/* jiffies of an entry that may have left a TIME_WAIT */
#define COLLECT_KEEP_MIN	(5 * HZ)	/* when either table is nearly full */
#define COLLECT_KEEP_IDLE	(600 * HZ)	/* unheld or, where not all is told, unused */
#define COLLECT_SWEEP	60		/* seconds from sweep to sweep */

static void collect_run(struct work_struct *work);
static DECLARE_DELAYED_WORK(collector, collect_run);

static void collect_dead(bool waiting, unsigned long keep)
{
	struct sniffer_owner *owner;
	raw_spinlock_t *lock;
	unsigned long flags;
	u64 cookie;

	while ((cookie = sniffer_owner_next_dead(waiting, keep))) {
		lock = sniffer_owner_lock(cookie);
		raw_spin_lock_irqsave(lock, flags);
		sniffer_owner_change(lock);
		owner = sniffer_owner_find(cookie);
		if (owner && !owner->dead)
			sniffer_owner_lives(owner);
		else if (owner && time_after(jiffies, owner->dead + keep))
			sniffer_owner_remove(owner);
		sniffer_owner_changed(lock);
		raw_spin_unlock_irqrestore(lock, flags);
		cond_resched();
	}
}

/*
 * Entries whose end was not seen. Nobody holds them, and they were long not used. If a
 * probe is missing, it is enough that they were long not used.
 */
static void collect_sweep(void)
{
	bool blind = !sniffer_probes_alive();
	struct sniffer_owner *owner;
	struct hlist_head *bucket;
	struct hlist_node *next;
	raw_spinlock_t *lock;
	unsigned long flags;
	unsigned int i;

	for (i = 0; (bucket = sniffer_owner_bucket(i, &lock)); i++) {
		if (!(i % 1024))
			cond_resched();
		if (hlist_empty(bucket))
			continue;
		raw_spin_lock_irqsave(lock, flags);
		sniffer_owner_change(lock);
		hlist_for_each_entry_safe(owner, next, bucket, by_cookie)
			if (!owner->dead && !owner->sock && (blind || !owner->held) &&
			    time_after(jiffies, owner->seen + COLLECT_KEEP_IDLE))
				sniffer_owner_remove(owner);
		sniffer_owner_changed(lock);
		raw_spin_unlock_irqrestore(lock, flags);
	}
}

static void collect_run(struct work_struct *work)
{
	static unsigned int ticks;
	bool tight = sniffer_owner_tight() || sniffer_process_tight();
	struct sniffer_proc *orphan;

	collect_dead(false, COLLECT_KEEP);
	collect_dead(true, tight ? COLLECT_KEEP_MIN : SNIFFER_OWNER_WAIT);
	if (++ticks % COLLECT_SWEEP == 0)
		collect_sweep();
	/* its work item found no memory */
	while ((orphan = sniffer_process_orphan())) {
		sniffer_holders_settle_process(orphan);
		sniffer_process_put(orphan);
	}
	sniffer_process_collect();
	schedule_delayed_work(&collector, HZ);
}

void sniffer_collect_init(void)
{
	schedule_delayed_work(&collector, HZ);
}

/* Hooks, probes and readers are gone: remove all entries. */
void sniffer_collect_exit(void)
{
	struct sniffer_owner *owner;
	struct hlist_head *bucket;
	struct hlist_node *next;
	raw_spinlock_t *lock;
	unsigned long flags;
	unsigned int i;

	cancel_delayed_work_sync(&collector);
	for (i = 0; (bucket = sniffer_owner_bucket(i, &lock)); i++) {
		raw_spin_lock_irqsave(lock, flags);
		sniffer_owner_change(lock);
		hlist_for_each_entry_safe(owner, next, bucket, by_cookie)
			sniffer_owner_remove(owner);
		sniffer_owner_changed(lock);
		raw_spin_unlock_irqrestore(lock, flags);
	}
}

// SPDX-License-Identifier: GPL-2.0-only
/*
 * Process events, for the group "processes". Probe handlers make them, but may not
 * send. So events wait in a list, and a work item multicasts them.
 */
#include <linux/llist.h>
#include <linux/slab.h>
#include <linux/workqueue.h>

#include "events.h"
#include "netlink.h"

#define EVENTS_MAX	4096	/* events that may wait */

struct event {
	struct llist_node node;
	size_t size;	/* of process, as sent */
	struct sniffer_process process;
};

static LLIST_HEAD(events);		/* newest first; lock-free */
static atomic_t events_waiting;
static atomic64_t events_dropped;

static void events_send_one(const struct event *event)
{
	struct sk_buff *skb = sniffer_netlink_begin(SNIFFER_GROUP_INDEX_PROCESSES,
						    event->size);

	if (!skb) {
		atomic64_inc(&events_dropped);
		return;
	}
	skb_put_data(skb, &event->process, event->size);
	sniffer_netlink_send(skb, SNIFFER_GROUP_INDEX_PROCESSES);
}

static void events_send(struct work_struct *work)
{
	struct llist_node *list = llist_reverse_order(llist_del_all(&events));
	struct event *event, *next;

	llist_for_each_entry_safe(event, next, list, node) {
		events_send_one(event);
		atomic_dec(&events_waiting);
		kfree(event);
	}
}

static DECLARE_WORK(events_work, events_send);

/**
 * sniffer_events_begin - get an event to fill
 *
 * Any context, interrupts off included.
 *
 * Return: an event that the caller fills and gives to sniffer_events_end(), or NULL
 * when nobody listens or too many wait.
 */
struct sniffer_process *sniffer_events_begin(void)
{
	struct event *event;

	if (!sniffer_netlink_listening(SNIFFER_GROUP_INDEX_PROCESSES))
		return NULL;
	if (atomic_inc_return(&events_waiting) > EVENTS_MAX)
		goto lost;
	event = kmalloc(sizeof(*event), GFP_ATOMIC | __GFP_NOWARN);
	if (!event)
		goto lost;
	return &event->process;
lost:
	atomic_dec(&events_waiting);
	atomic64_inc(&events_dropped);
	return NULL;
}

/**
 * sniffer_events_end - queue an event
 * @process: from sniffer_events_begin()
 * @with_start: it says how the process began
 */
void sniffer_events_end(struct sniffer_process *process, bool with_start)
{
	struct event *event = container_of(process, struct event, process);

	event->size = with_start ? sizeof(*process) : SNIFFER_PROCESS_NO_START;
	llist_add(&event->node, &events);
	queue_work(system_highpri_wq, &events_work);
}

/**
 * sniffer_events_lost - how many events were dropped since load
 */
u64 sniffer_events_lost(void)
{
	return atomic64_read(&events_dropped);
}

/* No new events come. The family still exists. */
void sniffer_events_exit(void)
{
	cancel_work_sync(&events_work);
	events_send(NULL);
}
